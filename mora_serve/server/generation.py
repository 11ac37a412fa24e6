"""GenerationService: a request's way from message to engine and back."""

# ruff: noqa: N802 - methods carry the names of their calls

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mora_serve import messages
from mora_serve.config import Config
from mora_serve.core import Decision, Event, Finish, Request, Source, TokenOut, Usage
from mora_serve.errors import DeadlineExceeded, Internal, Unavailable
from mora_serve.server import call as calls
from mora_serve.server.bridge import Bridge, Generation
from mora_serve.server.convert import sampling_of
from mora_serve.server.decider import Decider
from mora_serve.server.feedback import FeedbackRecorder
from mora_serve.server.prompts import Prompts
from mora_serve.v1 import generation_pb2 as pb
from mora_serve.v1.generation_pb2_grpc import GenerationServiceServicer

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]

_TOKENS = 128  # of one message, each with its alternatives
_FAR = 365 * 24 * 3600.0  # grpc says "no deadline" as one in the far future


@dataclass(frozen=True, slots=True)
class _Running:
    decision: Decision
    generation: Generation


class GenerationServicer(GenerationServiceServicer):
    """Generate and GenerateStream; ``feedback`` takes the prompts of task hints, where it is on."""

    def __init__(
        self,
        prompts: Prompts,
        decider: Decider,
        bridge: Bridge,
        config: Config,
        vocab_size: int,
        feedback: FeedbackRecorder | None,
    ) -> None:
        self._prompts = prompts
        self._decider = decider
        self._bridge = bridge
        self._config = config
        self._vocab_size = vocab_size
        self._feedback = feedback

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        """Answer when the whole text is ready."""
        response = pb.GenerateResponse(request_id=calls.current().request_id)
        texts: list[str] = []
        async with self._start(request, context) as running:
            async for event in running.generation:
                # As they come: all at once would keep the event loop from everybody else.
                response.tokens.extend(messages.token_message(t) for t in event.tokens)
                texts.append(event.text)
                if event.finish is not None:
                    finish, usage = _end(event)
        counts, timings = messages.usage_messages(usage)
        rest = pb.GenerateResponse(
            decision=messages.decision_message(running.decision),
            text="".join(texts),
            finish_reason=messages.finish_message(finish),
            usage=counts,
            timings=timings,
            seed=running.generation.request.sampling.seed,
        )
        response.MergeFrom(rest)
        return response

    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """Answer piece by piece."""
        async with self._start(request, context) as running:
            engine_request = running.generation.request
            started = pb.GenerationStarted(
                request_id=calls.current().request_id,
                decision=messages.decision_message(running.decision),
                prompt_tokens=len(engine_request.prompt),
                seed=engine_request.sampling.seed,
            )
            yield pb.GenerateStreamResponse(started=started)
            async for event in running.generation:
                if event.finish is not None:
                    finish, usage = _end(event)
                for text, tokens in _pieces(event):
                    delta = pb.GenerationDelta(
                        text=text, tokens=[messages.token_message(t) for t in tokens]
                    )
                    yield pb.GenerateStreamResponse(delta=delta)
            counts, timings = messages.usage_messages(usage)
            finished = pb.GenerationFinished(
                finish_reason=messages.finish_message(finish), usage=counts, timings=timings
            )
            yield pb.GenerateStreamResponse(finished=finished)

    @asynccontextmanager
    async def _start(
        self, request: pb.GenerateRequest | pb.GenerateStreamRequest, context: Context
    ) -> AsyncIterator[_Running]:
        """Check, tokenise, decide, submit; at the end, whatever it is, let go of everything."""
        arrival = time.monotonic()
        call = calls.current()
        sampling = sampling_of(request.sampling, self._config, self._vocab_size)
        self._prompts.check(request.prompt)
        known = max(1, len(request.prompt.token_ids.ids))  # a text's tokens are not counted yet
        deadline = _deadline(context)
        left = None if deadline is None else deadline - arrival
        # Rather than after tokenising and routing.
        self._bridge.check_line(call.tenant, known, sampling.max_tokens, left)
        prompt = await self._prompts.tokens(request.prompt, call.tenant)
        async with self._decider.decided(request.selection, request.prompt) as decision:
            submitted = Request(
                id=call.request_id,
                prompt=prompt,
                sampling=sampling,
                mixture=decision.mixture,
                tenant=call.tenant,
                arrival=arrival,
                deadline=deadline,
            )
            async with self._bridge.submit(submitted) as generation:
                # Not where the router took the place of an unknown task: it would teach itself.
                if self._feedback is not None and decision.source is Source.TASK:
                    tasks = request.selection.task.tasks
                    self._feedback.add(call.tenant, tasks, request.prompt, decision)
                yield _Running(decision, generation)


def _pieces(event: Event) -> Iterator[tuple[str, Sequence[TokenOut]]]:
    """What a slow reader has missed, in messages that take the event loop a moment each."""
    if event.text or event.tokens:
        yield event.text, event.tokens[:_TOKENS]
    for start in range(_TOKENS, len(event.tokens), _TOKENS):
        yield "", event.tokens[start : start + _TOKENS]


def _deadline(context: Context) -> float | None:
    remaining = context.time_remaining()
    if remaining is None or remaining > _FAR:
        return None
    return time.monotonic() + remaining


def _end(event: Event) -> tuple[Finish, Usage]:
    """How a request ended and what it used; raises where it did not end with an answer."""
    if event.finish is Finish.DEADLINE:
        raise DeadlineExceeded(
            "deadline: it passed before the answer was complete; allow more time or ask for "
            "fewer tokens"
        )
    if event.finish is Finish.CANCELLED:  # not by the client, who would not be here
        raise Unavailable("server: it is shutting down; send the call to another one")
    if event.error is not None:
        error = event.error.error()
        raise error.at("selection") if error.field == "mixture" else error
    if event.finish is None or event.usage is None:
        raise Internal("generation: it ended without a result; retry the request")
    calls.current().counts.update(
        prompt_tokens=event.usage.prompt_tokens, completion_tokens=event.usage.completion_tokens
    )
    return event.finish, event.usage
