"""The prompts of a fit, split into what is learnt from and what is measured with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mora_serve.router.arrays import Floats, unit
from mora_serve.router.evidence import gather
from mora_serve.router.features import Features, NGrams, Pool
from mora_serve.router.format import Calibration, Gate, RouterFile
from mora_serve.router.index import Index
from mora_serve.router.int8 import to_int8
from mora_serve.router.router import Router
from mora_serve.router.rows import Entry
from router_training.correction import CorrectionRecipe, learn_correction
from router_training.gates import WEIGHTS, Case
from router_training.router_data import FeatureTable, Ints, Labelled, RouterData, joined
from router_training.whitening import Array, Whitening

PROMPT_COUNTS = (1, 4, 16)  # prompts that a new adapter may come with
KEPT = 0.25  # of an adapter's prompts, whole wordings, for the gates
JOINED = 256  # made prompts for two adapters where none is given

_UNCALIBRATED = Calibration(0.0, 0.5, Gate((), 0.0), Gate((), 0.0))


@dataclass(frozen=True)
class FitOptions:
    """How a router is fitted.

    ``dims`` is K, ``prototypes`` how many a key has at most, ``key_prompts`` how many prompts
    the cards will hold. The best of ``strengths`` (λ) and ``blends`` is taken; adapters are kept
    out of the fit in ``folds`` parts. ``correct``: try a learnt correction as well.
    """

    features: Features = field(default_factory=lambda: Features(NGrams()))
    dims: int = 512
    prototypes: int = 8
    key_prompts: int = 16
    strengths: Sequence[float] = (0.1, 0.3, 1.0)
    blends: Sequence[float] = (0.0, 0.33, 0.5)
    folds: int = 4
    correct: bool = True
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Study:
    """The features of all prompts, by adapter and by what they are for; rows of the table."""

    options: FitOptions
    table: FeatureTable
    names: Sequence[str]
    groups: Sequence[str]
    learn: Sequence[Ints]  # rows by adapter
    kept: Sequence[Ints]
    mixtures: tuple[Sequence[Labelled], Sequence[Labelled]]  # learnt from, kept
    near: tuple[Ints, Ints]
    far: tuple[Ints, Ints]

    @classmethod
    def of(cls, data: RouterData, options: FitOptions, pool: Pool | None) -> Study:
        """Split data that are enough; raises what ``FeatureTable.of`` raises."""
        singles, rng = data.singles(), np.random.default_rng(options.seed)
        mixtures = data.mixtures() or joined(singles, data.groups, JOINED, options.seed)
        near, far = sorted(set(data.near)), sorted(set(data.far))
        texts = [*(t for own in singles.values() for t in own), *(m.prompt for m in mixtures)]
        table = FeatureTable.of([*texts, *near, *far], options.features, pool)

        def shuffled(texts: Sequence[str]) -> Ints:
            return table.where(texts)[rng.permutation(len(texts))]

        split = [_by_wording(table.rows, shuffled(own), KEPT, rng) for own in singles.values()]
        outside = [(rows[::2], rows[1::2]) for rows in (shuffled(near), shuffled(far))]
        return cls(
            options,
            table,
            tuple(singles),
            [data.groups.get(name, "") for name in singles],
            [learn for learn, _ in split],
            [kept for _, kept in split],
            _mixtures_by_wording(table, mixtures, dict(zip(singles, split, strict=True))),
            *outside,
        )

    def whitening(self, adapters: Sequence[int], *, whole: bool = False) -> Whitening:
        """Learnt from some adapters, and from mixtures of these alone; ``whole``: from all."""
        rows = self.table.rows
        own = [np.concatenate((self.learn[i], self.kept[i] if whole else [])) for i in adapters]
        names = {self.names[i] for i in adapters}
        together: dict[tuple[str, ...], list[str]] = {}
        for mixture in self.mixtures[0]:
            if names.issuperset(mixture.adapters):
                together.setdefault(mixture.adapters, []).append(mixture.prompt)
        others = [self.near[0], self.far[0], *map(self.table.where, together.values())]
        return Whitening.of(
            [rows[np.asarray(r, np.intp)] for r in own], [rows[r] for r in others if len(r) > 1]
        )

    def router(self, base: Whitening, strength: float, blend: float = 0.5) -> Router:
        """A router without calibration; its tensors rounded as its file rounds them."""
        matrix = base.matrix(strength, self.options.dims, self.options.seed)
        content = RouterFile(
            features=self.options.features,
            mean=base.mean.astype(np.float32),
            scales=np.zeros(0, np.float32),
            codes=np.zeros((0, 0), np.int8),
            calibration=dataclasses.replace(_UNCALIBRATED, blend=blend),
            prototypes=self.options.prototypes,
        )
        return Router(projected(content, matrix))

    def embed(self, content: RouterFile, rows: Ints) -> Floats:
        """Rows of the table as a router embeds them: unit vectors [rows, K]."""
        centred: Floats = self.table.rows[rows] - content.mean
        return unit(np.matmul(centred, content.projection, dtype=np.float32))

    def corrected(self, router: Router, adapters: Sequence[int]) -> Router:
        """With a correction learnt from some adapters."""
        content = router.content
        outside = np.concatenate((self.near[0], self.far[0]))
        matrix = learn_correction(
            [self.embed(content, self.learn[i]) for i in adapters],
            [self.embed(content, self.kept[i]) for i in adapters],
            self.embed(content, outside),
            CorrectionRecipe(key_prompts=self.options.key_prompts, seed=self.options.seed),
        )
        return Router(projected(content, content.projection @ matrix))

    def held_out(
        self, routers: Sequence[Router], parts: Sequence[Sequence[int]], blend: float
    ) -> dict[int, float]:
        """Mean accuracies of adapters, each by the router that has not seen it."""
        found = [self.accuracies(r, p, blend) for r, p in zip(routers, parts, strict=True)]
        return {n: float(np.mean([f[n] for f in found])) for n in found[0]}

    def accuracies(self, router: Router, part: Sequence[int], blend: float) -> dict[int, float]:
        """Top-1 of prompts for the adapters of ``part`` with keys of few prompts, by their number.

        Keys of all adapters are of prompts learnt from, the prompts measured are others.
        """
        counts = sorted({min(n, self.options.key_prompts) for n in PROMPT_COUNTS})
        out = {}
        for count in counts:
            keys = [router.key_of(self.embed(router.content, own[:count])) for own in self.learn]
            centres = np.stack([key.centre for key in keys])
            found = []
            for i in part:
                z = self.embed(
                    router.content, np.concatenate((self.learn[i][count:], self.kept[i]))
                )
                nearest = np.stack([(z @ key.prototypes.T).max(1) for key in keys], 1)
                best = ((1 - blend) * (z @ centres.T) + blend * nearest).argmax(1)
                found.append(float((best == i).mean()))
            out[count] = float(np.mean(found))
        return out

    def cases(self, router: Router, part: Sequence[int] | None) -> list[Case]:
        """Prompts as a server would score them that runs this router and knows all adapters.

        ``part``: the adapters that are new to the router; their prompts, and no others, are
        asked. None asks those of all adapters, in wordings that were kept from it.
        """
        count = self.options.key_prompts
        entries = []
        for name, group, own in zip(self.names, self.groups, self.learn, strict=True):
            rows = own[:count]
            key = router.key([self.table.texts[i] for i in rows], self.table.states(rows))
            if key is not None:
                entries.append(("", Entry(name, key, group)))
        index = Index.of(entries)
        cases: list[Case] = []

        def ask(rows: Ints, right: Sequence[str], kind: str, share: float) -> None:
            # Asked as text, along the server's own path.
            states = self.table.states(rows)
            for n, row in enumerate(rows):
                pooled = None if states is None else states[n]
                seen = gather(router, index, "", self.table.texts[row], pooled)
                if seen is not None:
                    cases.append(Case(seen, frozenset(right), share / len(rows), kind))

        asked = range(len(self.names)) if part is None else part
        for i in asked:
            rows = self.kept[i]
            if part is not None:
                rows = np.concatenate((self.learn[i][count:], rows))
            kind = "known" if part is None else "new"
            ask(rows, (self.names[i],), kind, WEIGHTS[kind] / len(asked))
        names = {self.names[i] for i in asked}
        mixtures = [*(self.mixtures[0] if part is not None else ()), *self.mixtures[1]]
        mixtures = [m for m in mixtures if names.intersection(m.adapters)]
        for m in mixtures:
            share = WEIGHTS["mixture"] / len(mixtures)
            ask(self.table.where([m.prompt]), m.adapters, "mixture", share)
        ask(self.near[1], (), "near", WEIGHTS["near"])
        ask(self.far[1], (), "far", WEIGHTS["far"])
        return cases


def projected(content: RouterFile, matrix: Array) -> RouterFile:
    """With another projection [D, K]; its scale says nothing, as prompts are normalised."""
    codes, scales = to_int8((matrix / np.abs(matrix).max()).T.astype(np.float32))
    return dataclasses.replace(content, codes=codes, scales=scales)


def _mixtures_by_wording(
    table: FeatureTable, mixtures: Sequence[Labelled], singles: Mapping[str, tuple[Ints, Ints]]
) -> tuple[list[Labelled], list[Labelled]]:
    """Prompts for several adapters, apart from those kept: where one of the adapters is asked for
    as in one of its prompts that are kept."""
    parts: tuple[list[Labelled], list[Labelled]] = ([], [])
    for mixture in mixtures:
        row = table.rows[table.index[mixture.prompt]]
        nearest = [
            [float((table.rows[r] @ row).max()) for r in singles[a]] for a in mixture.adapters
        ]
        parts[any(kept > learn for learn, kept in nearest)].append(mixture)
    return parts


def _by_wording(
    rows: Floats, own: Ints, share: float, rng: np.random.Generator
) -> tuple[Ints, Ints]:
    """Prompts to learn from, and prompts kept: about that share, whole groups of like ones.

    What is measured is then worded unlike what was learnt, as a user's next prompt may be.
    """
    if len(own) < 4:
        return own, own[:0]
    z = unit(rows[own] - rows[own].mean(0))
    count = max(3, len(own) // 8)
    centres = z[rng.permutation(len(z))[:count]]
    for _ in range(8):
        nearest = (z @ centres.T).argmax(1)
        sums = [z[nearest == j].sum(0) for j in range(count)]
        centres = unit(np.stack([s if s.any() else c for s, c in zip(sums, centres, strict=True)]))
    taken = np.zeros(len(own), bool)
    for j in rng.permutation(count):
        more = taken | (nearest == j)
        if more.sum() <= max(1, 1.5 * share * len(own)):
            taken = more
        if taken.sum() >= share * len(own):
            break
    if not taken.any():
        taken[: max(1, len(own) // 5)] = True
    return own[~taken], own[taken]
