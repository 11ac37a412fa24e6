"""Which contents are offered: those found damaged are not, until they are registered again.

The records of damaged contents stay, so that whoever registers the same content again finds its
version, card and pin as they were. To subscribers it is as if they were removed and came back.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from mora_serve.adapters.history import History, Subscriber
from mora_serve.adapters.record import AdapterRecord, Change

log = logging.getLogger(__name__)


class Offers:
    """Follows a history and tells of what is offered."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._subscribers: list[Subscriber] = []
        self._withdrawn: frozenset[str] = frozenset()
        self.turns = 0  # how often something was withdrawn or restored
        history.subscribe(self._changed)

    def __contains__(self, digest: str) -> bool:
        """Whether a content is offered, as far as its health goes."""
        return digest not in self._withdrawn

    def subscribe(self, callback: Subscriber) -> None:
        """Tell of every change of what is offered from now on; with the history's lock held."""
        self._subscribers.append(callback)

    def withdraw(self, digest: str) -> None:
        """Offer a content no more."""
        with self._history.lock:
            if digest not in self._withdrawn:
                self._withdrawn |= {digest}
                self._turn(digest, back=False)

    def restore(self, digest: str) -> None:
        """Offer a content again, if it was withdrawn."""
        if digest in self._withdrawn:
            with self._history.lock:
                if digest in self._withdrawn:
                    self._withdrawn -= {digest}
                    self._turn(digest, back=True)

    def _turn(self, digest: str, *, back: bool) -> None:
        self.turns += 1
        state = self._history.state
        said = "is whole again" if back else "is damaged or missing, and not used"
        if state.router is not None and state.router.digest == digest:
            log.error("registry: the stored router, content %s, %s", digest, said)
        for _, record in sorted(state.adapters.items()):
            if record.digest != digest:
                continue
            who = record.name, record.tenant, digest
            log.error("registry: adapter %s of tenant %s, content %s, %s", *who, said)
            here, gone = (None, record) if not back else (record, None)
            self._tell(Change(state.revision, before=gone, after=here))

    def _changed(self, change: Change) -> None:
        offered = replace(
            change, before=self._offered(change.before), after=self._offered(change.after)
        )
        if offered != Change(change.revision):
            self._tell(offered)

    def _offered(self, record: AdapterRecord | None) -> AdapterRecord | None:
        return record if record is not None and record.digest in self else None

    def _tell(self, change: Change) -> None:
        for callback in self._subscribers:
            callback(change)
