"""Texts whose hidden states the router waits for: a pass of some of them between two steps.

A pass is small, so that running streams keep their pace, and takes a text of each tenant in turn,
and of each of its jobs: no tenant's prompts wait for all of another's, and one adapter's keys not
for those of all that a new router needs.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from mora_serve.config import EngineConfig
from mora_serve.engine.failures import ENGINE_FAILED, DeviceLost
from mora_serve.errors import Internal, MoraError
from mora_serve.model.decoder import Decoder
from mora_serve.model.pooling import States, pool_states

log = logging.getLogger(__name__)

# Of a step's tokens, for prompts to route and for keys: a token through a quarter of the layers
# counts as a quarter of one. While requests run, keys also have a share of the time at most: on a
# CPU a pass of few tokens still dequantises its layers.
SHARE, BACKGROUND_SHARE = 1 / 4, 1 / 16
BACKGROUND_TIME = 1 / 4


@dataclass(slots=True, eq=False)
class PoolJob:
    """Texts as tokens; ``done`` gets their states [texts, hidden] after ``depth`` layers.

    ``background``: no request waits for it. ``tenant``: whose turn it takes.
    """

    texts: Sequence[Sequence[int]]
    depth: int
    background: bool = False
    tenant: str = ""
    done: Future[States] = field(default_factory=Future)
    taken: int = 0  # texts in a pass or behind it
    states: list[States] = field(default_factory=list)


class PoolLine:
    """Jobs in line, those of each tenant in a line of their own; the tenants take turns."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[PoolJob]] = OrderedDict()  # by turn; none is empty
        self._count = 0  # of its own, as other threads ask for it at any moment

    def __len__(self) -> int:
        return self._count

    def __bool__(self) -> bool:
        return bool(self._lines)

    def append(self, job: PoolJob) -> None:
        """Put a job at the end of its tenant's line."""
        self._lines.setdefault(job.tenant, deque()).append(job)
        self._count += 1

    def popleft(self) -> PoolJob:
        """The first job of the tenant whose turn it is; its next turn is behind the others'."""
        tenant, line = self._lines.popitem(last=False)
        job = line.popleft()
        self._count -= 1
        if line:
            self._lines[tenant] = line
        return job

    def appendleft(self, job: PoolJob) -> None:
        """Make a job the next one."""
        self._lines.setdefault(job.tenant, deque()).appendleft(job)
        self._count += 1
        self._lines.move_to_end(job.tenant, last=False)

    def pass_over(self, job: PoolJob) -> None:
        """A job that was taken out is no turn of its tenant's, who is next again."""
        if job.tenant in self._lines:
            self._lines.move_to_end(job.tenant, last=False)

    def discard(self, job: PoolJob) -> None:
        """Take a job out, if it is in line."""
        line = self._lines.get(job.tenant, deque())
        if job in line:
            line.remove(job)
            self._count -= 1
            if not line:
                del self._lines[job.tenant]


class PoolQueue:
    """Jobs in line, and the passes that work them off. For one thread.

    ``pool`` computes the states of texts after some layers, by default by the decoder alone.
    """

    def __init__(
        self,
        decoder: Decoder,
        limits: EngineConfig,
        pool: Callable[[Sequence[Sequence[int]], int], States] | None = None,
    ) -> None:
        self._decoder = decoder
        self._pool = pool or (lambda texts, depth: pool_states(decoder, texts, depth))
        self._step_tokens = limits.step_tokens
        self._urgent = PoolLine()
        self._background = PoolLine()
        self._rest_until = 0.0
        self.tokens = 0  # pooled since the start

    def __len__(self) -> int:
        return len(self._urgent) + len(self._background)

    @property
    def urgent(self) -> int:
        """Jobs in line that requests wait for."""
        return len(self._urgent)

    def add(self, job: PoolJob) -> None:
        """Put a job in line; without texts it is done."""
        if job.texts:
            (self._background if job.background else self._urgent).append(job)
        elif job.done.set_running_or_notify_cancel():
            job.done.set_result(np.zeros((0, self._decoder.shape.hidden_size), np.float32))

    def run(self, busy: bool) -> int:
        """One pass for requests and one in the background, where jobs are in line.

        ``busy``: requests run beside. Returns the cost in tokens through all layers.
        """
        cost = self._pass(self._urgent, SHARE)
        start = time.monotonic()
        if not self._background or (busy and start < self._rest_until):
            return cost
        cost += self._pass(self._background, BACKGROUND_SHARE if busy else SHARE)
        end = time.monotonic()
        self._rest_until = end + (end - start) * (1 / BACKGROUND_TIME - 1)
        return cost

    def fail(self, error: MoraError) -> None:
        """End every job in line with an error."""
        for jobs in (self._urgent, self._background):
            while jobs:
                _end(jobs.popleft(), error)

    def _pass(self, jobs: PoolLine, share: float) -> int:
        batch = self._take(jobs, share)
        if not batch:
            return 0
        depth, texts = batch[0][0].depth, [text for _, text in batch]
        try:
            states: list[States | None] = list(self._pool(texts, depth))
        except DeviceLost:
            for job in {id(job): job for job, _ in batch}.values():
                jobs.discard(job)
                if not job.done.done():
                    _end(job, ENGINE_FAILED.error())
            raise
        except Exception:  # what one text does must not end the thread that serves all
            log.exception("pooling %d texts failed; each is tried alone", len(texts))
            states = [self._alone(text, depth) for text in texts]
        for (job, _), state in zip(batch, states, strict=True):
            if state is None:
                jobs.discard(job)
                if not job.done.done():
                    _end(job, _failed())
                continue
            job.states.append(state)
            if len(job.states) == len(job.texts):
                job.done.set_result(np.stack(job.states))
        tokens = sum(map(len, texts))
        self.tokens += tokens
        return -(-tokens * depth // len(self._decoder.layers))

    def _alone(self, text: Sequence[int], depth: int) -> States | None:
        try:
            state: States = self._pool([text], depth)[0]
        except Exception:
            log.exception("a text of %d tokens cannot be pooled", len(text))
            return None
        return state

    def _take(self, jobs: PoolLine, share: float) -> list[tuple[PoolJob, Sequence[int]]]:
        """Texts of one depth with their jobs: one at least, however long; the rest stay in line."""
        batch: list[tuple[PoolJob, Sequence[int]]] = []
        others: list[PoolJob] = []
        tokens = 0
        while jobs:
            job = jobs.popleft()
            if batch and job.depth != batch[0][0].depth:
                others.append(job)
                continue
            text = job.texts[job.taken]
            most = share * self._step_tokens * len(self._decoder.layers) / max(job.depth, 1)
            if batch and tokens + len(text) > most:
                jobs.appendleft(job)
                break
            if not job.taken and not job.done.set_running_or_notify_cancel():
                jobs.pass_over(job)  # whoever waited has left
                continue
            job.taken += 1
            tokens += len(text)
            batch.append((job, text))
            if job.taken < len(job.texts):
                jobs.append(job)
        for job in reversed(others):
            jobs.appendleft(job)
        return batch


def _end(job: PoolJob, error: MoraError) -> None:
    if job.taken or job.done.set_running_or_notify_cancel():
        job.done.set_exception(error)


def _failed() -> MoraError:
    return Internal(
        "router: the base's hidden state could not be computed; retry the request",
        reason="POOLING_FAILED",
    )
