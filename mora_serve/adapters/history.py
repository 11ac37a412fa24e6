"""The registry's state as the log has it: one state after another, each announced once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

from mora_serve.adapters.changelog import Log
from mora_serve.adapters.record import Change, State
from mora_serve.errors import MoraError, Unavailable

T = TypeVar("T")

Subscriber = Callable[[Change], None]

_MEANINGLESS = (KeyError, TypeError, ValueError, AttributeError)


class History:
    """Follows a log and appends to it.

    ``state`` is immutable and may be read without the lock. The lock is held while a state is
    succeeded by another and this is announced, and never while the log is read or written: that
    may take a store a minute.
    """

    def __init__(self, log: Log, snapshot_every: int) -> None:
        self.state = State()
        self.lock = threading.RLock()
        self._writing = threading.Lock()  # changes of this process take turns
        self._log = log
        self._snapshot_every = snapshot_every
        self._subscribers: list[Subscriber] = []

    def subscribe(self, callback: Subscriber) -> State:
        """Announce every change from now on; returns the state that the first one follows."""
        with self.lock:
            self._subscribers.append(callback)
            return self.state

    def refresh(self) -> None:
        """Take in what other processes have appended.

        Raises ConfigError for what another version wrote.
        """
        while True:
            state = self.state
            steps = self._news(state)
            with self.lock:
                if self.state is state:
                    for later, changes in steps:
                        self._succeed(later, changes)
                    return
            # Another thread has taken something in meanwhile.

    def poll(self) -> None:
        """``refresh`` if there is something new; while there is not, nobody waits for the look."""
        if self._log.newer(self.state.revision):
            self.refresh()

    def newest(self) -> State:
        """The state of the log as it is now, without taking it in."""
        state = self.state
        steps = self._news(state)
        return steps[-1][0] if steps else state

    def derive(self, work: Callable[[State], T]) -> T:
        """What ``work`` makes of the state; what it refuses (MoraError) by an old one it is asked
        again of the newest.
        """
        while True:
            state = self.state
            try:
                return work(state)
            except MoraError:
                if not self._outdated(state):
                    raise

    def commit(self, change: Callable[[State], Change | None]) -> tuple[State, Change | None]:
        """Append what ``change`` derives from the state; again if another process came first.

        Returns the state after it, and the change, None where ``change`` found none needed.
        """
        with self._writing:
            while True:
                before, made = self.derive(lambda state: (state, change(state)))
                if made is None:
                    if self._outdated(before):  # the newest may need one
                        continue
                    return before, None
                if self._log.append(made.revision, made.to_json()):
                    break
                self.refresh()
            after = before.after(made)
            with self.lock:
                if self.state is before:  # or it has been read from the log already
                    self._succeed(after, [made])
            self._compact(after)
            return after, made

    def _outdated(self, state: State) -> bool:
        """Whether another state has come after it, from the log if need be."""
        if self._log.newer(state.revision):
            self.refresh()
        return self.state is not state

    def _compact(self, state: State) -> None:
        if self._log.since_snapshot(state.revision) < self._snapshot_every:
            return
        try:
            self._log.snapshot(state.revision, state.to_json(), self._snapshot_every)
        except (OSError, Unavailable) as e:  # the change is durable; the next one tries again
            why = e.strerror if isinstance(e, OSError) else e.message
            logging.getLogger(__name__).warning("registry: no snapshot: %s", why)

    def _news(self, state: State) -> list[tuple[State, list[Change]]]:
        """The states that come after one, and what led to each."""
        while True:
            news = self._log.read(state.revision)
            now, steps = state, []
            if news.snapshot is not None:
                try:
                    later = State.from_json(news.start, news.snapshot)
                except _MEANINGLESS:
                    self._log.reject(news.start, snapshot=True)
                    continue
                steps.append((later, now.changes_to(later)))
                now = later
            for number, values in news.changes:
                try:
                    change = now.change_from_json(number, values)
                    now = now.after(change)
                except _MEANINGLESS:
                    self._log.reject(number)
                    change = Change(number)
                    now = now.after(change)
                steps.append((now, [change]))
            return steps

    def _succeed(self, state: State, changes: Iterable[Change]) -> None:
        self.state = state
        for change in changes:
            for callback in self._subscribers:
                callback(change)
