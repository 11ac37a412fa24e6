"""A router with adapters registered, as a server would hold them: their keys come from cards."""

from __future__ import annotations

from collections.abc import Sequence

from mora_serve.config import RouterConfig
from mora_serve.core import DEFAULT_TENANT
from mora_serve.router.decide import Choice, decide
from mora_serve.router.evidence import gather
from mora_serve.router.index import Index
from mora_serve.router.router import Router
from mora_serve.router.rows import Entry
from router_training.sources import CardedAdapter


class Registered:
    """Routes prompts among adapters, by n-grams; one whose card has no prompts is never picked."""

    def __init__(self, router: Router, adapters: Sequence[CardedAdapter]) -> None:
        self._router = router
        self.names = tuple(adapter.name for adapter in adapters)
        entries = []
        for adapter in adapters:
            key = router.key(adapter.card.prompts)
            if key is not None:
                entries.append((DEFAULT_TENANT, Entry(adapter.name, key, adapter.card.group)))
        self._index = Index.of(entries)

    def route(self, prompt: str) -> Choice:
        """The router's choice under the server's default limit."""
        seen = gather(self._router, self._index, DEFAULT_TENANT, prompt)
        return decide(seen, self._router.calibration, RouterConfig().max_adapters)
