"""What a router is fitted on: prompts and the adapters that are right for them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

from mora_serve.errors import InvalidArgument
from mora_serve.router.arrays import Floats
from mora_serve.router.features import Features, Pool

Ints = npt.NDArray[np.intp]

MIN_ADAPTERS, MIN_PROMPTS, MIN_OUTSIDE = 3, 10, 64
_JOINS = ("{}, {}", "{} and {}", "{}. {}", "{}, then {}")


@dataclass(frozen=True, slots=True)
class Labelled:
    """A prompt and the adapters that have to run for it, all of them, at weight 1."""

    prompt: str
    adapters: tuple[str, ...]


@dataclass(frozen=True)
class RouterData:
    """Labelled prompts, and prompts that no adapter is for.

    ``near`` ones are worded like the labelled ones, ``far`` ones are about anything else.
    ``groups``: by adapter, the group of its card; at most one of a group runs in a mixture.
    """

    labelled: Sequence[Labelled]
    near: Sequence[str] = ()
    far: Sequence[str] = ()
    groups: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        examples: Mapping[str, Iterable[str]],
        far: Sequence[str],
        near: Sequence[str] = (),
        groups: Mapping[str, str] | None = None,
    ) -> Self:
        """From example prompts by adapter."""
        labelled = [Labelled(p, (name,)) for name, own in examples.items() for p in own]
        return cls(labelled, near, far, groups or {})

    @property
    def adapters(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted({name for row in self.labelled for name in row.adapters}))

    def singles(self) -> dict[str, list[str]]:
        """The distinct prompts of each adapter alone, sorted."""
        found: dict[str, set[str]] = {name: set() for name in self.adapters}
        for row in self.labelled:
            if len(row.adapters) == 1:
                found[row.adapters[0]].add(row.prompt)
        return {name: sorted(prompts) for name, prompts in found.items()}

    def mixtures(self) -> list[Labelled]:
        """The distinct prompts that several adapters are right for together, sorted."""
        rows = {(r.prompt, tuple(sorted(set(r.adapters)))) for r in self.labelled}
        return [Labelled(prompt, names) for prompt, names in sorted(rows) if len(names) > 1]

    def check(self) -> None:
        """Raise InvalidArgument for too little data: see ``fit_router``."""
        singles = self.singles()
        if len(singles) < MIN_ADAPTERS:
            raise InvalidArgument(
                f"examples: {len(singles)} adapters are too few; give {MIN_ADAPTERS} or more",
                field="examples",
            )
        for name, prompts in singles.items():
            _enough(f"examples.{name}", f" of adapter {name!r} alone", len(prompts), MIN_PROMPTS)
        _enough("outside", "", len({*self.near, *self.far}), MIN_OUTSIDE)


def _enough(field: str, of: str, count: int, least: int) -> None:
    if count < least:
        raise InvalidArgument(
            f"{field}: {count} distinct prompts{of} are too few; give {least} or more", field=field
        )


def joined(
    singles: Mapping[str, Sequence[str]], groups: Mapping[str, str], count: int, seed: int
) -> list[Labelled]:
    """``count`` prompts for two adapters, each made of a prompt of either.

    A stand-in where no prompt for several is given. Adapters of one group exclude each other.
    """
    rng = np.random.default_rng(seed)
    pairs = [
        pair
        for pair in itertools.permutations(sorted(singles), 2)
        if not groups.get(pair[0]) or groups.get(pair[0]) != groups.get(pair[1])
    ]
    made = []
    for i in range(count if pairs else 0):
        pair = pairs[int(rng.integers(len(pairs)))]
        parts = [singles[name][int(rng.integers(len(singles[name])))] for name in pair]
        made.append(Labelled(_JOINS[i % len(_JOINS)].format(*parts), pair))
    return made


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """All prompts of a fit and their features [n, D] float32, each computed once.

    ``pooled`` [n, hidden size] are their states where the features need these.
    """

    texts: Sequence[str]
    rows: Floats
    pooled: Floats | None
    index: Mapping[str, int]

    @classmethod
    def of(cls, texts: Iterable[str], features: Features, pool: Pool | None) -> Self:
        """Raises InvalidArgument where the features need states and no ``pool`` gives them."""
        distinct = sorted(set(texts))
        pooled = pool(distinct) if pool is not None and features.hidden is not None else None
        rows = features.dense(distinct, pooled)
        return cls(distinct, rows, pooled, {t: i for i, t in enumerate(distinct)})

    def where(self, texts: Iterable[str]) -> Ints:
        """Row numbers of texts."""
        return np.array([self.index[text] for text in texts], np.intp)

    def states(self, rows: Ints) -> Floats | None:
        """Their states [len(rows), hidden size], if there are any."""
        return None if self.pooled is None else self.pooled[rows]
