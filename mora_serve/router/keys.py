"""From adapters' cards to their keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mora_serve.adapters.record import AdapterRecord
from mora_serve.errors import FailedPrecondition
from mora_serve.router.arrays import Floats
from mora_serve.router.router import AdapterKey, Router
from mora_serve.router.rows import Entry
from mora_serve.router.states import States

TOGETHER = 64  # adapters whose states are in memory at the same time


def entries(
    router: Router, records: Sequence[AdapterRecord], states: States | None
) -> Iterator[tuple[AdapterRecord, Entry | None]]:
    """Each record with its entry in the index (see ``entry_of``).

    Where the router is on hidden states, waits for ``states``: raises FailedPrecondition where
    there are none, and what ``States.submit`` raises.
    """
    hidden = router.hidden
    if hidden is None:
        yield from ((record, entry_of(router, record)) for record in records)
        return
    base = needed(states)
    for start in range(0, len(records), TOGETHER):
        part = records[start : start + TOGETHER]
        cards = [record.card for record in part]
        texts = sorted({text for card in cards for text in (*card.prompts, card.description)})
        pooled = base.submit(texts, hidden, background=True).result()
        by_text = dict(zip(texts, pooled, strict=True))
        yield from ((record, entry_of(router, record, by_text)) for record in part)


def entry_of(
    router: Router, record: AdapterRecord, states: Mapping[str, Floats] | None = None
) -> Entry | None:
    """An adapter's key from its example prompts.

    Without any, from its description; the router then picks it only where it is named. None
    where neither has anything to go by. ``states`` of all these texts where the router is on
    hidden states.
    """
    card = record.card

    def key(texts: Sequence[str]) -> AdapterKey | None:
        return router.key(texts, None if states is None else [states[text] for text in texts])

    made = key(card.prompts)
    if made is not None:
        return Entry(record.name, made, card.group)
    made = key((card.description,))
    return None if made is None else Entry(record.name, made, card.group, listed=False)


def needed(states: States | None) -> States:
    """The states. Raises FailedPrecondition where no base runs that could give them."""
    if states is None:
        raise FailedPrecondition(
            "router: it was fitted on hidden states, and no base runs here; load a router on "
            "n-grams",
            field="router.features",
            reason="NO_BASE",
        )
    return states
