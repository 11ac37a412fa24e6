"""A step that raises ends the request that it raises for, and no other.

The batch is run again in halves, and those in halves, until what raises is alone. To run tokens
again is harmless: their keys and values land in the same places, and noise depends on seed and
position only, so the others get the tokens that they would have had.

Where memory was short for all together and for nobody alone, steps are run in smaller parts for a
while.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

import torch

from mora_serve.core import TokenOut
from mora_serve.engine.failures import DeviceLost, is_memory, out_of_memory, step_failed
from mora_serve.engine.pace import MIN_TOKENS
from mora_serve.engine.scheduler import Chunk
from mora_serve.engine.sequence import Sequence
from mora_serve.errors import Failure

log = logging.getLogger(__name__)

Outputs = list[tuple[Sequence, TokenOut | None]]

SMALL_STEPS = 256  # steps before parts may be twice as large again


@dataclass(slots=True)
class Outcome:
    """What a step came to: tokens (see Runner.run), and who ended by it and why.

    ``raised`` counts the parts that raised, ``passed`` those that did not; ``short`` are the
    fewest tokens for which memory did not suffice, 0 where it did.
    """

    outputs: Outputs = field(default_factory=list)
    failed: dict[Sequence, Failure] = field(default_factory=dict)
    raised: int = 0
    passed: int = 0
    short: int = 0

    @property
    def broken(self) -> bool:
        """Nothing could be computed for anybody, and not for want of memory."""
        return bool(self.raised) and not self.passed and not self.short


class Isolation:
    """Runs batches through ``run``; ``beat`` is called before each part, as a sign of life."""

    def __init__(
        self, run: Callable[[Seq[Chunk]], Outputs], beat: Callable[[], object] = lambda: None
    ) -> None:
        self.raised = 0  # batches, and parts of them, that raised
        self._forward = run
        self._beat = beat
        self._most = 0  # tokens a part, while memory is short; 0: any number
        self._steps = 0  # until it is tried with more

    def run(self, batch: Seq[Chunk]) -> Outcome:
        """One step. Raises DeviceLost, as it would for every part."""
        outcome = Outcome()
        for part in list(_parts(batch, self._most)):
            self._run(part, outcome)
        self._adjust(batch, outcome)
        return outcome

    def _run(self, chunks: Seq[Chunk], outcome: Outcome) -> None:
        part = [c for c in chunks if c.sequence not in outcome.failed]
        if not part:
            return
        self._beat()
        memory: bool | None = None  # None: nothing was raised
        try:
            outputs = self._forward(part)
        except DeviceLost:
            raise
        except Exception as e:
            memory = is_memory(e)
            ids = ", ".join(c.sequence.request.id for c in part)
            if outcome.raised:
                log.error("%d of them raise as well: %s: %s", len(part), type(e).__name__, ids)
            else:
                log.exception("a step of %d requests raised: %s", len(part), ids)
        # Outside of the handler: the exception holds on to all that the forward had allocated.
        if memory is None:
            outcome.passed += 1
            outcome.outputs += outputs
            return
        self.raised += 1
        outcome.raised += 1
        if memory:
            tokens = sum(c.length for c in part)
            outcome.short = min(outcome.short or tokens, tokens)
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.empty_cache()
        halves = _halves(part, memory)
        if not halves:
            sequence = part[0].sequence
            reason = out_of_memory if memory else step_failed
            outcome.failed[sequence] = reason(sequence.request.id)
        for half in halves:
            self._run(half, outcome)

    def _adjust(self, batch: Seq[Chunk], outcome: Outcome) -> None:
        """After a step: how large the parts of the next ones may be."""
        if outcome.short and not outcome.failed:
            self._most, self._steps = max(1, outcome.short // 2), SMALL_STEPS
            log.warning("memory is short: steps run in parts of %d tokens", self._most)
        elif self._most:
            self._steps -= 1
            if not self._steps:
                enough = 2 * self._most >= sum(c.length for c in batch)
                self._most, self._steps = 0 if enough else 2 * self._most, SMALL_STEPS


def _halves(part: list[Chunk], memory: bool) -> list[list[Chunk]]:
    """A part in two; none when there is nothing left to tell apart, or to make smaller."""
    if len(part) > 1:
        middle = len(part) // 2
        return [part[:middle], part[middle:]]
    chunk = part[0]
    if not memory or chunk.length <= MIN_TOKENS:
        return []
    return [[piece] for piece in _cut(chunk, chunk.length // 2)]


def _cut(chunk: Chunk, length: int) -> tuple[Chunk, Chunk]:
    """Its first tokens, and the others, to be run in this order."""
    first = replace(chunk, length=length, samples=False)
    rest = replace(chunk, start=chunk.start + length, length=chunk.length - length)
    return first, rest


def _parts(batch: Seq[Chunk], most: int) -> Iterator[list[Chunk]]:
    """The batch in parts of at most ``most`` tokens, 0 for no limit; long chunks are cut."""
    part: list[Chunk] = []
    room = most or sum(c.length for c in batch)
    for chunk in batch:
        rest = chunk
        while rest.length > room:
            # Two chunks of a sequence may not share a forward: the second reads the first's keys.
            if room and chunk.length > most:
                first, rest = _cut(rest, room)
                part.append(first)
            yield part
            part, room = [], most
        part.append(rest)
        room -= rest.length
    yield part
