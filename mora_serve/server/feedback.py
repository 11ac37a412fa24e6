"""Feedback off the event loop: labelled prompts queue up for a thread that writes them down.

Taking a row in never waits and never fails: where the disk is full, slow or gone, rows are dropped
and counted, and requests go on. Reading has a thread of its own besides.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from mora_serve.core import Decision, Mixture, Source
from mora_serve.errors import MoraError, NotFound
from mora_serve.metrics import Dropped, Metrics
from mora_serve.router.feedback import FeedbackRow, FeedbackStore, Page, Position
from mora_serve.router.selection import AutoRoute
from mora_serve.router.states import State
from mora_serve.server.prompts import text_of
from mora_serve.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from mora_serve.server.assembly import Assembly

T = TypeVar("T")

QUEUE_BYTES = 8 << 20  # that wait to be written
_ROW_BYTES = 1 << 10  # that a row takes beside its prompt, amply
_PAUSE_SECONDS = 0.2  # between two writes, so that each carries what came meanwhile
_TOGETHER = 64  # rows that are routed at once, and then written
_FLUSH_SECONDS = 2.0  # that an export waits for rows on their way to the disk

_UNKNOWN = Decision(Mixture(), Source.ABSTAINED)  # no router could be asked

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A labelled prompt as the event loop leaves it; the thread makes a row of it."""

    tenant: str
    prompt: pb.Prompt
    tasks: tuple[str, ...]
    adapters: tuple[str, ...]
    ranked: bool
    time: float
    nbytes: int


class FeedbackRecorder:
    """Writes labelled prompts to a store, and gives them back.

    ``text`` gives what a prompt is routed by, ``states`` what the router needs of some texts, and
    ``routed`` the router's own decision for a tenant, a text and its state; they are called on the
    thread that writes, and may wait. ``ranks`` tells of a tenant's tasks whether one has several
    adapters. ``fingerprint`` is the base's.
    """

    def __init__(
        self,
        store: FeedbackStore,
        text: Callable[[pb.Prompt], str],
        states: Callable[[Sequence[str]], Sequence[State | None]],
        routed: Callable[[str, str, State | None], Decision],
        ranks: Callable[[str, Sequence[str]], bool],
        fingerprint: str,
        metrics: Metrics,
    ) -> None:
        self._store = store
        self._text = text
        self._states = states
        self._routed = routed
        self._ranks = ranks
        self._fingerprint = fingerprint
        self._metrics = metrics
        self._state = threading.Condition()
        self._waiting: list[_Waiting] = []
        self._bytes = 0
        self._taken = self._done = 0  # rows ever taken in, and ever written or dropped
        self._hurry = self._closed = False
        self._failing = False
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="feedback-read")
        self._writer = threading.Thread(target=self._run, name="feedback-write", daemon=True)
        self._writer.start()

    @classmethod
    def of(cls, assembly: Assembly, metrics: Metrics) -> FeedbackRecorder | None:
        """A recorder for a server's parts, or None where feedback is off."""
        if assembly.feedback is None:
            return None

        def routed(tenant: str, text: str, state: State | None) -> Decision:
            return assembly.selector.decide(tenant, AutoRoute(), text, state)

        def ranks(tenant: str, tasks: Sequence[str]) -> bool:
            try:
                return assembly.selector.ranks(tenant, tasks)
            except NotFound:  # its last adapter has gone since: nothing contradicts the decision
                return False

        text = partial(text_of, tokenizer=assembly.base.tokenizer)
        states, fingerprint = assembly.routing.states, assembly.base.fingerprint
        return cls(assembly.feedback, text, states, routed, ranks, fingerprint, metrics)

    def add(self, tenant: str, tasks: Sequence[str], prompt: pb.Prompt, decision: Decision) -> None:
        """Take in a prompt whose tasks its caller named; dropped where too much waits."""
        own = pb.Prompt()
        own.CopyFrom(prompt)  # of the request nothing else is to stay in memory
        waiting = _Waiting(
            tenant,
            own,
            tuple(dict.fromkeys(tasks)),
            tuple(a.adapter for a in decision.mixture.adapters),
            bool(decision.candidates),  # without a router there are none: ``ranks`` tells then
            time.time(),
            own.ByteSize() + _ROW_BYTES,
        )
        with self._state:
            full = self._closed or self._bytes + waiting.nbytes > QUEUE_BYTES
            if not full:
                self._waiting.append(waiting)
                self._bytes += waiting.nbytes
                self._taken += 1
                self._state.notify_all()
        if full:
            self._metrics.feedback_dropped(Dropped.QUEUE, 1)

    async def pages(
        self, tenant: str, start: Position, since: float, made: Callable[[Page], T]
    ) -> AsyncIterator[T]:
        """The tenant's rows as ``FeedbackStore.read`` gives them, to the last; at least one page.

        ``made`` makes of each page, on the thread that reads, what is wanted of it.
        What has been taken in by now is among them, unless the disk or the base takes too long.
        """
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._reader, self.flush, _FLUSH_SECONDS)

        def read(start: Position) -> tuple[Page, T]:
            page = self._store.read(start, tenant, since)
            return page, made(page)

        page = Page([], start, False)
        while not page.last:
            page, wanted = await loop.run_in_executor(self._reader, read, page.end)
            if page.rows or page.last:
                yield wanted

    def flush(self, seconds: float) -> bool:
        """Wait until what was taken in is written or dropped; whether it was within ``seconds``."""
        with self._state:
            goal = self._taken
            self._hurry = True
            self._state.notify_all()
            return self._state.wait_for(lambda: self._done >= goal, seconds)

    def close(self, seconds: float = 5.0) -> None:
        """Take in nothing more; what waits has ``seconds`` to reach the disk."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        self._writer.join(seconds)
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._waiting or self._closed)
                batch, self._waiting, self._bytes = self._waiting, [], 0
                self._hurry = False
            if not batch:
                return
            for start in range(0, len(batch), _TOGETHER):
                part = batch[start : start + _TOGETHER]
                self._write(part)
                with self._state:
                    self._done += len(part)
                    self._state.notify_all()
            with self._state:
                self._state.wait_for(lambda: self._hurry or self._closed, _PAUSE_SECONDS)

    def _write(self, batch: Sequence[_Waiting]) -> None:
        rows = self._rows(batch)
        try:
            written = self._store.append(rows)
        except OSError as e:
            if not self._failing:
                log.warning("feedback: rows are dropped: %s", e.strerror)
            self._failing = True
            self._metrics.feedback_dropped(Dropped.DISK, len(rows))
            return
        self._failing = False
        self._metrics.feedback_written(written)
        self._metrics.feedback_dropped(Dropped.SIZE, len(rows) - written)

    def _rows(self, batch: Sequence[_Waiting]) -> list[FeedbackRow]:
        """With what the router picks; without where it cannot be asked: the label counts."""
        texts: list[str] = []
        labelled: list[_Waiting] = []
        for waiting in batch:
            with self._dropping():
                texts.append(self._text(waiting.prompt))
                labelled.append(waiting)
        states: Sequence[State | None] | None = None
        try:
            states = self._states(texts)
        except MoraError as e:
            log.warning("feedback: %d rows are not routed: %s", len(texts), e.message)
        except Exception:  # whatever it is: this thread writes everybody's rows
            log.exception("feedback: %d rows are not routed", len(texts))
        rows: list[FeedbackRow] = []
        for i, (waiting, text) in enumerate(zip(labelled, texts, strict=True)):
            with self._dropping():
                decision = _UNKNOWN
                if states is not None:
                    with contextlib.suppress(MoraError):
                        decision = self._routed(waiting.tenant, text, states[i])
                rows.append(self._row(waiting, text, decision))
        return rows

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        """Drop a row where making it fails: whatever it is, the thread goes on."""
        try:
            yield
        except Exception:
            log.exception("feedback: a row is dropped")
            self._metrics.feedback_dropped(Dropped.ERROR, 1)

    def _row(self, waiting: _Waiting, text: str, routed: Decision) -> FeedbackRow:
        return FeedbackRow(
            tenant=waiting.tenant,
            prompt=text,
            tasks=waiting.tasks,
            adapters=waiting.adapters,
            routed=tuple(a.adapter for a in routed.mixture.adapters),
            router_digest=routed.router_digest,
            base_fingerprint=self._fingerprint,
            time=waiting.time,
            ranked=waiting.ranked or self._ranks(waiting.tenant, waiting.tasks),
        )
