"""What a way to route says of prompts, in one shape for ours and for every baseline."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mora_serve.config import RouterConfig
from mora_serve.core import DEFAULT_TENANT
from mora_serve.router.arrays import Floats
from mora_serve.router.decide import Choice, decide
from mora_serve.router.evidence import gather
from mora_serve.router.features import Pool
from mora_serve.router.index import Index
from mora_serve.router.router import Router
from mora_serve.router.rows import Entry
from router_training.evaluation.cases import Case, FittingData
from router_training.evaluation.metrics import Array, Bools, Ints

Chosen = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Scored:
    """Prompts [n] against adapters [a].

    ``ranking`` [n, a]: the higher the likelier. ``probability`` [n, a]: that an adapter is for
    the prompt, or None where the method gives none. ``inside`` [n]: the higher, the less likely
    is the prompt nobody's. ``chosen``: the adapters that would run, none where it abstains.
    """

    names: tuple[str, ...]
    ranking: Array
    probability: Array | None
    inside: Array
    chosen: tuple[Chosen, ...]

    def truth(self, cases: Sequence[Case]) -> Ints:
        """The column of each case's first adapter [n]; -1 where it has none."""
        columns = {name: i for i, name in enumerate(self.names)}
        return np.array([columns[c.adapters[0]] if c.adapters else -1 for c in cases], np.intp)

    def wanted(self, cases: Sequence[Case]) -> Bools:
        """[n, a]: whether the case is for the adapter."""
        return np.array([[name in c.adapters for name in self.names] for c in cases])


def join(parts: Sequence[Scored]) -> Scored:
    """The prompts of all parts, whose adapters are the same in whatever order."""
    names = parts[0].names
    orders = [[part.names.index(name) for name in names] for part in parts]
    pairs = list(zip(parts, orders, strict=True))
    probabilities = [p.probability[:, o] for p, o in pairs if p.probability is not None]
    return Scored(
        names,
        np.concatenate([part.ranking[:, order] for part, order in pairs]),
        np.concatenate(probabilities) if len(probabilities) == len(parts) else None,
        np.concatenate([part.inside for part in parts]),
        tuple(chosen for part in parts for chosen in part.chosen),
    )


class Scorer(Protocol):
    """A router with its adapters registered."""

    def __call__(self, prompts: Sequence[str]) -> Scored:
        """Score prompts."""
        ...


class Fitted(Protocol):
    """A router after its fitting."""

    def register(self, cards: Mapping[str, Sequence[str]]) -> Scorer:
        """With these adapters, each known by its example prompts alone."""
        ...


Method = Callable[[FittingData], Fitted]
"""Fits a router."""


class FittedRouter:
    """The server's own router."""

    def __init__(self, router: Router, groups: Mapping[str, str], pool: Pool | None = None) -> None:
        self._router, self._groups, self._pool = router, groups, pool

    def register(self, cards: Mapping[str, Sequence[str]]) -> Scorer:
        """See ``Fitted``; an adapter whose prompts have no feature is left out."""
        return RouterScorer(self._router, cards, self._groups, self._pool)


class RouterScorer:
    """The server's router, index and rule of decision, without the server.

    ``pool`` gives the states of prompts where the router is on hidden states.
    """

    def __init__(
        self,
        router: Router,
        cards: Mapping[str, Sequence[str]],
        groups: Mapping[str, str],
        pool: Pool | None = None,
    ) -> None:
        self.router, self.cards, self._pool = router, cards, pool
        self.names = tuple(cards)
        keys = {n: router.key(some, pool and pool(some)) for n, some in cards.items()}
        self.keys = {name: key for name, key in keys.items() if key is not None}
        self._entries = [Entry(n, key, groups.get(n, "")) for n, key in self.keys.items()]
        self.index = Index.of((DEFAULT_TENANT, entry) for entry in self._entries)
        self._most = RouterConfig().max_adapters

    def route(self, prompt: str) -> Choice:
        """The server's choice under its default limit, and the candidates."""
        return self._decide(prompt, self._state(prompt), self._most)

    def beside(self, entries: Sequence[Entry]) -> RouterScorer:
        """The same with more adapters registered, which may be chosen and are not scored."""
        more = copy.copy(self)
        more.index = Index.of((DEFAULT_TENANT, e) for e in (*self._entries, *entries))
        return more

    def embedded(self, prompts: Sequence[str]) -> list[Floats]:
        """Prompts in the router's space, each [K]."""
        pairs = zip(prompts, self._states(prompts), strict=True)
        return [self.router.embed(prompt, state) for prompt, state in pairs]

    def __call__(self, prompts: Sequence[str]) -> Scored:
        """Score prompts; all adapters are candidates, in the router's own order."""
        size = (len(prompts), len(self.names))
        ranking, probability = np.full(size, -np.inf), np.zeros(size)
        inside = np.zeros(len(prompts))
        columns = {name: i for i, name in enumerate(self.names)}
        chosen = []
        for row, (prompt, state) in enumerate(zip(prompts, self._states(prompts), strict=True)):
            candidates = self._decide(prompt, state, len(self.names)).candidates
            chosen.append(self._decide(prompt, state, self._most).adapters)
            for place, candidate in enumerate(candidates):
                ranking[row, columns[candidate.adapter]] = -place
                probability[row, columns[candidate.adapter]] = candidate.probability
            if candidates:
                inside[row] = candidates[0].probability
        return Scored(self.names, ranking, probability, inside, tuple(chosen))

    def _decide(self, prompt: str, state: Floats | None, most: int) -> Choice:
        seen = gather(self.router, self.index, DEFAULT_TENANT, prompt, state)
        return decide(seen, self.router.calibration, most)

    def _state(self, prompt: str) -> Floats | None:
        return self._states([prompt])[0]

    def _states(self, prompts: Sequence[str]) -> Sequence[Floats | None]:
        return [None] * len(prompts) if self._pool is None else list(self._pool(prompts))
