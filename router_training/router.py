"""Fitting the router: whitened prototypes on hashed n-grams.

With the mean μ and the pooled within-adapter covariance Σ of the features φ of labelled prompts,
z = (Σ + λ (tr Σ / D) I)^(-1/2) (φ - μ) has what prompts of one adapter differ in (mostly the
data they carry) shrunk to the size of noise; an adapter's key is the mean direction of its
prompts. z is projected to K dimensions: those that the known adapters' means span are kept as
they are, the rest, where adapters to come will lie, by random directions so scaled that inner
products keep their expectation. K is 512: on the demo's tasks that costs adapters to come 1 to 3
points of accuracy against all 2048 dimensions, K = 256 costs 4, measured on templates never seen
and over six projections and six choices of 16 prompts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mora_serve.errors import InvalidArgument
from mora_serve.router.decide import gate
from mora_serve.router.features import Floats, NGrams
from mora_serve.router.format import Calibration, RouterFile
from mora_serve.router.int8 import to_int8
from mora_serve.router.router import AdapterKey, Router, unit

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]

PROMPT_COUNTS = (1, 4, 16)  # prompts that a new adapter may come with
REJECTED = 0.05  # share of in-domain prompts that the base may get
IMPOSTORS = 128
MIN_ADAPTERS, MIN_PROMPTS, MIN_OUT_OF_DOMAIN = 3, 10, 64

_UNCALIBRATED = Calibration(threshold=0.0, gate_position=0.5, gate_width=0.1, coherence=0.5)


@dataclass(frozen=True)
class FitReport:
    """What the fit measured, on prompts that it did not learn from.

    ``strength`` is λ: the one with the best mean of ``held_out``.
    ``known``: top-1 accuracy of the adapters learned from, each among all.
    ``held_out[n]``: the same of adapters kept out of μ, Σ and the projection, with a key from n
    prompts, cross-validated; ``full_rank[n]``: that without the projection to K dimensions.
    ``auroc``, ``auroc_held_out``: the abstention score's, prompts of known or held-out adapters
    against out-of-domain ones.
    ``abstained``, ``abstained_held_out``: shares of these adapters' prompts that the base gets;
    ``accepted``: that of out-of-domain prompts that an adapter gets.
    ``calibration_error``: the gates' expected calibration error over ten bins.
    """

    strength: float
    known: float
    held_out: Mapping[int, float]
    full_rank: Mapping[int, float]
    auroc: float
    auroc_held_out: float
    abstained: float
    abstained_held_out: float
    accepted: float
    calibration_error: float

    def numbers(self) -> dict[str, float]:
        """Flat, as the router's file holds it."""
        out: dict[str, float] = {}
        for name, value in dataclasses.asdict(self).items():
            values = value if isinstance(value, dict) else {"": value}
            out |= {f"{name}_{n}".rstrip("_"): v for n, v in values.items()}
        return out


def fit_router(
    examples: Mapping[str, Sequence[str]],
    out_of_domain: Sequence[str],
    fingerprint: str = "",
    *,
    features: NGrams | None = None,
    dims: int = 512,
    key_prompts: int = 16,
    strengths: Sequence[float] = (0.1, 0.3, 1.0),
    folds: int = 4,
    seed: int = 0,
) -> tuple[bytes, FitReport]:
    """Fit a router on example prompts by adapter, and prompts of no adapter.

    A fifth of each adapter's prompts is kept for measuring and calibration. ``key_prompts`` is
    how many prompts an adapter's card will hold. ``fingerprint`` is the base's; a router without
    one fits any. Returns the router's file and the report, which the file holds too; equal
    arguments give equal bytes on one machine.

    Raises InvalidArgument for too little data: it takes 3 adapters with 10 distinct prompts
    each, and 64 distinct prompts of no adapter.
    """
    study = _Study.of(examples, out_of_domain, features or NGrams(), dims, key_prompts, seed)
    order = np.random.default_rng(seed).permutation(len(study.adapters))
    parts = [order[i :: min(folds, len(order))] for i in range(min(folds, len(order)))]
    bases = [_Whitening.of(study.learn(np.setdiff1d(order, part))) for part in parts]

    def held_out(strength: float, projected: bool) -> dict[int, float]:
        found: dict[int, list[float]] = {n: [] for n in PROMPT_COUNTS}
        for part, base in zip(parts, bases, strict=True):
            router = study.router(base, strength, projected)
            for n in PROMPT_COUNTS:
                found[n].append(study.measure(router, part, n).accuracy())
        return {n: float(np.mean(values)) for n, values in found.items()}

    tried = {strength: held_out(strength, True) for strength in strengths}
    strength = max(tried, key=lambda s: sum(tried[s].values()))
    final = study.router(_Whitening.of(study.learn(order)), strength)
    routers = [study.router(base, strength) for base in bases]

    pairs = list(zip(routers, parts, strict=True))
    prior = dataclasses.replace(
        _UNCALIBRATED, coherence=float(np.mean([study.coherence(r, part) for r, part in pairs]))
    )
    final, pairs = _with(final, prior), [(_with(r, prior), part) for r, part in pairs]
    known = study.measure(final, order, key_prompts)
    outside = study.measure(final, None, key_prompts)
    new = _join([study.measure(r, part, key_prompts) for r, part in pairs])
    outside_new = _join([study.measure(r, None, key_prompts) for r, _ in pairs])

    seen = _join([known, new, outside])
    position, width = _fit_gate(seen.relative, seen.labels())
    calibration = dataclasses.replace(
        prior,
        threshold=_conformal(np.concatenate([known.best(), new.best()])),
        gate_position=position,
        gate_width=width,
    )
    probability = gate(seen.relative.astype(np.float32), calibration)
    report = FitReport(
        strength=float(strength),
        known=known.accuracy(),
        held_out=tried[strength],
        full_rank=held_out(strength, False),
        auroc=_auroc(known.best(), outside.best()),
        auroc_held_out=_auroc(new.best(), outside_new.best()),
        abstained=float((known.best() < calibration.threshold).mean()),
        abstained_held_out=float((new.best() < calibration.threshold).mean()),
        accepted=float((outside.best() >= calibration.threshold).mean()),
        calibration_error=_calibration_error(probability, seen.labels()),
    )
    content = dataclasses.replace(
        final.content,
        calibration=calibration,
        fingerprint=fingerprint,
        known=tuple(sorted(examples)),
        report=report.numbers(),
    )
    return content.to_bytes(), report


@dataclass(frozen=True)
class _Whitening:
    """Mean and within-adapter covariance, the latter by its eigenvectors with eigenvalues > 0."""

    mean: Array
    means: Array  # [n, D] of the adapters learned from
    values: Array  # [r]
    vectors: Array  # [D, r]

    @classmethod
    def of(cls, adapters: Sequence[Array]) -> _Whitening:
        means = np.stack([rows.mean(0) for rows in adapters])
        spread = np.concatenate([rows - m for rows, m in zip(adapters, means, strict=True)])
        spread /= math.sqrt(len(spread))
        few = len(spread) < spread.shape[1]  # of the two Gram matrices the smaller one
        values, vectors = np.linalg.eigh(spread @ spread.T if few else spread.T @ spread)
        kept = values > 1e-9 * max(float(values[-1]), 1e-12)
        values, vectors = values[kept], vectors[:, kept]
        if few:
            vectors = spread.T @ vectors / np.sqrt(values)
        return cls(np.concatenate(adapters).mean(0), means, values, vectors)

    def matrix(self, strength: float, dims: int, seed: int) -> Array:
        """[D, dims]: (φ - mean) @ matrix is whitened, and projected where dims < D."""
        size = len(self.mean)
        if dims >= size:
            return self._whiten(np.eye(size), strength)
        means = self._whiten((self.means - self.mean).T, strength)
        axes, _, _ = np.linalg.svd(means, full_matrices=False)
        kept = axes[:, : min(len(self.means) - 1, dims // 2)]
        random = np.random.default_rng(seed).normal(size=(size, dims - kept.shape[1]))
        random, _ = np.linalg.qr(random - kept @ (kept.T @ random))
        scale = math.sqrt((size - kept.shape[1]) / random.shape[1])
        return self._whiten(np.concatenate([kept, random * scale], 1), strength)

    def _whiten(self, columns: Array, strength: float) -> Array:
        """(Σ + ridge I)^(-1/2) @ columns [D, n]."""
        ridge = strength * max(float(self.values.sum()) / len(self.mean), 1e-12)
        change = (self.values + ridge) ** -0.5 - ridge**-0.5
        along = self.vectors.T @ columns
        out: Array = columns * ridge**-0.5 + self.vectors @ (change[:, None] * along)
        return out


@dataclass(frozen=True)
class _Measured:
    """Prompts [n] against all adapters [a], scored as ``mora_serve.router.index`` does.

    ``truth`` [n] is the column of the right adapter, -1 for prompts of none.
    """

    cosine: Floats
    normed: Floats
    relative: Floats
    truth: Ints

    def accuracy(self) -> float:
        return float((self.cosine.argmax(1) == self.truth).mean())

    def best(self) -> Floats:
        """What abstention looks at [n]."""
        out: Floats = self.normed.max(1)
        return out

    def labels(self) -> Array:
        """[n, a]: 1 where the adapter is right."""
        columns = np.arange(self.cosine.shape[1])
        out: Array = (self.truth[:, None] == columns).astype(np.float64)
        return out


@dataclass(frozen=True)
class _Study:
    """The features of all prompts, split into what is learned from and what is measured with."""

    features: NGrams
    adapters: Sequence[tuple[Array, Array]]  # (learn [n, D], measure [m, D])
    impostors: Array
    outside: Array
    dims: int
    key_prompts: int
    seed: int

    @classmethod
    def of(
        cls,
        examples: Mapping[str, Sequence[str]],
        out_of_domain: Sequence[str],
        features: NGrams,
        dims: int,
        key_prompts: int,
        seed: int,
    ) -> _Study:
        rng = np.random.default_rng(seed)

        def rows(prompts: Sequence[str], field: str, least: int) -> Array:
            distinct = sorted(set(prompts))
            if len(distinct) < least:
                raise InvalidArgument(
                    f"{field}: {len(distinct)} distinct prompts are too few; give {least} or more",
                    field=field,
                )
            return features.dense(distinct)[rng.permutation(len(distinct))].astype(np.float64)

        if len(examples) < MIN_ADAPTERS:
            raise InvalidArgument(
                f"examples: {len(examples)} adapters are too few; give {MIN_ADAPTERS} or more",
                field="examples",
            )
        adapters = [rows(examples[n], f"examples.{n}", MIN_PROMPTS) for n in sorted(examples)]
        outside = rows(out_of_domain, "out_of_domain", MIN_OUT_OF_DOMAIN)
        impostors = min(IMPOSTORS, len(outside) // 2)
        split = [(a[len(a) // 5 :], a[: len(a) // 5]) for a in adapters]
        rest = outside[impostors:]
        return cls(features, split, outside[:impostors], rest, dims, key_prompts, seed)

    def learn(self, adapters: Ints) -> list[Array]:
        return [self.adapters[i][0] for i in adapters]

    def router(self, base: _Whitening, strength: float, projected: bool = True) -> Router:
        """A router without calibration; its tensors rounded as its file rounds them."""
        dims = self.dims if projected else self.features.dim
        matrix = base.matrix(strength, dims, self.seed)
        codes, scales = to_int8((matrix / np.abs(matrix).max()).T.astype(np.float32))
        mean = base.mean.astype(np.float32)
        projection = (codes * scales[:, None]).T
        impostors = _whitened(self.impostors, mean, projection).astype(np.float16)
        return Router(
            RouterFile(
                self.features, mean, scales, codes, impostors.astype(np.float32), _UNCALIBRATED
            )
        )

    def keys(self, router: Router, count: int) -> list[AdapterKey]:
        return [router.key_of(_embed(router, learn[:count])) for learn, _ in self.adapters]

    def measure(self, router: Router, adapters: Ints | None, count: int) -> _Measured:
        """Prompts of some adapters (None: of no adapter) against keys of ``count`` prompts."""
        keys = self.keys(router, count)
        if adapters is None:
            rows, truth = self.outside, np.full(len(self.outside), -1)
        else:
            parts = [self.adapters[i][1] for i in adapters]
            rows, truth = np.concatenate(parts), np.repeat(adapters, [len(p) for p in parts])
        cosine = _embed(router, rows) @ np.stack([k.prototype for k in keys]).T
        low = np.array([k.impostor_mean for k in keys], np.float32)
        deviation = np.array([k.impostor_std for k in keys], np.float32)
        own = np.array([k.own for k in keys], np.float32)
        above = cosine - low
        return _Measured(cosine, above / deviation, above / (own - low), truth)

    def coherence(self, router: Router, adapters: Ints) -> float:
        """The mean cosine of two prompts of one adapter."""
        found = []
        for rows in self.learn(adapters):
            z = _embed(router, rows)
            n = len(z)
            found.append((float(np.square(z.sum(0)).sum()) - n) / (n * (n - 1)))
        return min(max(float(np.mean(found)), 0.01), 0.99)


def _embed(router: Router, rows: Array) -> Floats:
    return _whitened(rows, router.content.mean, router.content.projection)


def _whitened(rows: Array, mean: Floats, projection: Floats) -> Floats:
    return unit(np.matmul(rows.astype(np.float32) - mean, projection, dtype=np.float32))


def _with(router: Router, calibration: Calibration) -> Router:
    return Router(dataclasses.replace(router.content, calibration=calibration))


def _join(parts: Sequence[_Measured]) -> _Measured:
    names = [f.name for f in dataclasses.fields(_Measured)]
    return _Measured(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))


def _conformal(scores: Floats) -> float:
    """The score that a new one of the same kind falls below with probability REJECTED at most."""
    rank = math.floor(REJECTED * (len(scores) + 1))
    return float(np.sort(scores)[max(rank, 1) - 1])


def _fit_gate(relative: Floats, labels: Array) -> tuple[float, float]:
    """(position, width) of the most likely logistic gate, by Newton's method.

    A weak prior keeps the width from vanishing where the two kinds do not overlap.
    """
    x, y = relative.ravel().astype(np.float64), labels.ravel()
    design = np.stack([x, np.ones_like(x)], 1)
    theta, prior = np.array([5.0, -2.5]), 1e-2 * np.eye(2)
    for _ in range(100):
        p = 0.5 * (1 + np.tanh(0.5 * design @ theta))
        gradient = design.T @ (p - y) + prior @ theta
        hessian = (design.T * (p * (1 - p))) @ design + prior
        step = np.linalg.solve(hessian, gradient)
        theta -= step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-9:
            break
    slope = max(float(theta[0]), 1e-3)
    return float(-theta[1]) / slope, 1.0 / slope


def _auroc(inside: Floats, outside: Floats) -> float:
    """The probability that an inside score is above an outside one; ties count half."""
    above = np.searchsorted(np.sort(outside), inside, "left")
    upto = np.searchsorted(np.sort(outside), inside, "right")
    return float((above + upto).mean() / (2 * len(outside)))


def _calibration_error(probability: Floats, labels: Array) -> float:
    p, y = probability.ravel().astype(np.float64), labels.ravel()
    bins = np.minimum((p * 10).astype(int), 9)
    gaps = [abs((p - y)[bins == b].sum()) for b in range(10)]
    return float(sum(gaps) / len(p))
