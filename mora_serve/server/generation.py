"""GenerationService: a request's way from message to engine and back."""

# ruff: noqa: N802 - methods carry the names of their calls

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

from mora_serve import messages
from mora_serve.server import call as calls
from mora_serve.server.answers import Answers, Asked, Running, end_of, in_pieces
from mora_serve.v1 import generation_pb2 as pb
from mora_serve.v1.generation_pb2_grpc import GenerationServiceServicer

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]

_FAR = 365 * 24 * 3600.0  # grpc says "no deadline" as one in the far future


class GenerationServicer(GenerationServiceServicer):
    """Generate and GenerateStream."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        """Answer when the whole text is ready."""
        response = pb.GenerateResponse(request_id=calls.current().request_id)
        texts: list[str] = []
        async with self._start(request, context) as running:
            async for event in running.generations[0]:
                # As they come: all at once would keep the event loop from everybody else.
                response.tokens.extend(messages.token_message(t) for t in event.tokens)
                texts.append(event.text)
                if event.finish is not None:
                    finish, usage = end_of(event)
        counts, timings = messages.usage_messages(usage)
        rest = pb.GenerateResponse(
            decision=messages.decision_message(running.decision),
            text="".join(texts),
            finish_reason=messages.finish_message(finish),
            usage=counts,
            timings=timings,
            seed=running.request.sampling.seed,
        )
        response.MergeFrom(rest)
        return response

    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """Answer piece by piece."""
        async with self._start(request, context) as running:
            engine_request = running.request
            started = pb.GenerationStarted(
                request_id=calls.current().request_id,
                decision=messages.decision_message(running.decision),
                prompt_tokens=len(engine_request.prompt),
                seed=engine_request.sampling.seed,
            )
            yield pb.GenerateStreamResponse(started=started)
            async for event in running.generations[0]:
                if event.finish is not None:
                    finish, usage = end_of(event)
                for text, tokens in in_pieces(event):
                    delta = pb.GenerationDelta(
                        text=text, tokens=[messages.token_message(t) for t in tokens]
                    )
                    yield pb.GenerateStreamResponse(delta=delta)
            counts, timings = messages.usage_messages(usage)
            finished = pb.GenerationFinished(
                finish_reason=messages.finish_message(finish), usage=counts, timings=timings
            )
            yield pb.GenerateStreamResponse(finished=finished)

    def _start(
        self, request: pb.GenerateRequest | pb.GenerateStreamRequest, context: Context
    ) -> AbstractAsyncContextManager[Running]:
        asked = Asked(request.prompt, request.selection, request.sampling, _deadline(context))
        return self._answers.running(asked)


def _deadline(context: Context) -> float | None:
    remaining = context.time_remaining()
    if remaining is None or remaining > _FAR:
        return None
    return time.monotonic() + remaining
