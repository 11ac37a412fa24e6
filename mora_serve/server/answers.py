"""A request's way to the engine and back, whatever protocol it came by.

Requests are the API's messages (``mora_serve/v1``), which each protocol makes of what it reads.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from mora_serve.config import Config
from mora_serve.core import Decision, Event, Finish, Request, Source, TokenOut, Usage
from mora_serve.errors import DeadlineExceeded, Internal, Unavailable
from mora_serve.server import call as calls
from mora_serve.server.bridge import Bridge, Generation
from mora_serve.server.convert import sampling_of
from mora_serve.server.decider import Decider
from mora_serve.server.feedback import FeedbackRecorder
from mora_serve.server.prompts import Prompts
from mora_serve.server.tracing import Tracing
from mora_serve.v1 import generation_pb2 as pb

_SEEDS = 1 << 64
_TOKENS = 128  # of one message, each with its alternatives


@dataclass(frozen=True, slots=True)
class Asked:
    """What one answer is asked for by; ``deadline`` is in ``time.monotonic()`` seconds or None.

    ``count`` answers are sampled from one decision, with seeds that follow each other.
    """

    prompt: pb.Prompt
    selection: pb.Selection
    sampling: pb.SamplingParams
    deadline: float | None = None
    count: int = 1


@dataclass(frozen=True, slots=True)
class Running:
    """Answers that are being computed: the decision that they share, and the events of each."""

    decision: Decision
    generations: tuple[Generation, ...]

    @property
    def request(self) -> Request:
        """What the engine was asked for, by the first of the answers."""
        return self.generations[0].request


class Answers:
    """Starts answers.

    ``feedback`` takes the prompts of task hints, where it is on; ``tracing`` makes spans, likewise.
    """

    def __init__(
        self,
        prompts: Prompts,
        decider: Decider,
        bridge: Bridge,
        config: Config,
        vocab_size: int,
        feedback: FeedbackRecorder | None,
        tracing: Tracing | None = None,
    ) -> None:
        self._prompts = prompts
        self._decider = decider
        self._bridge = bridge
        self._config = config
        self._vocab_size = vocab_size
        self._feedback = feedback
        self._tracing = tracing

    @asynccontextmanager
    async def running(self, asked: Asked) -> AsyncIterator[Running]:
        """Check, tokenise, decide, submit; at the end, whatever it is, let go of everything.

        Raises what ``sampling_of``, ``Prompts``, ``Decider`` and ``Bridge.submit`` raise.
        """
        if self._tracing is None:
            async with self._submitted(asked) as running:
                yield running
            return
        with self._tracing.generation(asked) as span:
            async with self._submitted(asked) as running:
                span.decided(running.decision)
                try:
                    yield running
                finally:
                    span.answered(running.generations)

    @asynccontextmanager
    async def _submitted(self, asked: Asked) -> AsyncIterator[Running]:
        arrival = time.monotonic()
        call = calls.current()
        sampling = sampling_of(asked.sampling, self._config, self._vocab_size)
        self._prompts.check(asked.prompt)
        known = max(1, len(asked.prompt.token_ids.ids))  # a text's tokens are not counted yet
        left = None if asked.deadline is None else asked.deadline - arrival
        # Rather than after tokenising and routing.
        self._bridge.check_line(call.tenant, known, sampling.max_tokens, left)
        prompt = await self._prompts.tokens(asked.prompt, call.tenant)
        async with (
            self._decider.decided(asked.selection, asked.prompt) as decision,
            AsyncExitStack() as stack,
        ):
            generations = []
            for i in range(asked.count):
                submitted = Request(
                    id=call.request_id,
                    prompt=prompt,
                    sampling=replace(sampling, seed=(sampling.seed + i) % _SEEDS),
                    mixture=decision.mixture,
                    tenant=call.tenant,
                    arrival=arrival,
                    deadline=asked.deadline,
                )
                generation = self._bridge.submit(submitted)
                generations.append(await stack.enter_async_context(generation))
            for generation in generations:
                await generation.admitted()
            # Not where the router took the place of an unknown task: it would teach itself.
            if self._feedback is not None and decision.source is Source.TASK:
                tasks = asked.selection.task.tasks
                self._feedback.add(call.tenant, tasks, asked.prompt, decision)
            yield Running(decision, tuple(generations))


def in_pieces(event: Event) -> Iterator[tuple[str, Sequence[TokenOut]]]:
    """What a slow reader has missed, in messages that take the event loop a moment each."""
    if event.text or event.tokens:
        yield event.text, event.tokens[:_TOKENS]
    for start in range(_TOKENS, len(event.tokens), _TOKENS):
        yield "", event.tokens[start : start + _TOKENS]


def end_of(event: Event) -> tuple[Finish, Usage]:
    """How a request ended and what it used, by its last event.

    Raises what it ended with where that is no answer.
    """
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
    counts = calls.current().counts
    for name in ("prompt_tokens", "completion_tokens"):
        counts[name] = counts.get(name, 0) + getattr(event.usage, name)
    return event.finish, event.usage
