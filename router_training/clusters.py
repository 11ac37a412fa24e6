"""Clusters of texts without labels, and a gate that tells them by the text alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]

_RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)  # of the kernel's mean diagonal


def kmeans(
    points: Array, count: int, rng: np.random.Generator, restarts: int = 3, steps: int = 30
) -> Ints:
    """A cluster for each of the points [n, d]: at most ``count``, none of them empty, from 0.

    Lloyd's algorithm from k-means++ centres (Arthur and Vassilvitskii, 2007); the best of
    ``restarts`` by the sum of squared distances.
    """
    count = min(count, len(points))
    best, found = np.inf, np.zeros(len(points), np.intp)
    for _ in range(restarts):
        centres = _spread_out(points, count, rng)
        labels = np.full(len(points), -1)
        for _ in range(steps):
            distances = _squared(points, centres)
            before, labels = labels, distances.argmin(1)
            if (before == labels).all():
                break
            for c in np.unique(labels):
                centres[c] = points[labels == c].mean(0)
        cost = float(_squared(points, centres).min(1).sum())
        if cost < best:
            best, found = cost, labels
    return np.unique(found, return_inverse=True)[1].astype(np.intp)


def _spread_out(points: Array, count: int, rng: np.random.Generator) -> Array:
    chosen = [int(rng.integers(len(points)))]
    nearest = _squared(points, points[chosen])[:, 0]
    while len(chosen) < count:
        total = nearest.sum()
        weights = nearest / total if total > 0 else None
        chosen.append(int(rng.choice(len(points), p=weights)))
        nearest = np.minimum(nearest, _squared(points, points[chosen[-1:]])[:, 0])
    return points[chosen].copy()


def _squared(points: Array, centres: Array) -> Array:
    out: Array = (points**2).sum(1)[:, None] - 2 * points @ centres.T + (centres**2).sum(1)
    np.maximum(out, 0.0, out=out)
    return out


@dataclass(frozen=True, eq=False)
class TextGate:
    """Probabilities of clusters from features alone: ridge regression on their probabilities.

    In its dual form, the inverse of the features' total covariance is part of the solution, so
    that what all texts have in common counts for little. ``held_out`` [n, clusters] is, of each
    row of the fit, what the gate says when it is fitted without this row: a wrong label does
    not confirm itself.
    """

    mean: Array
    weights: Array  # [features, clusters]
    offset: Array  # [clusters]
    held_out: Array

    @classmethod
    def fit(cls, features: Array, targets: Array, known: Eigen | None = None) -> TextGate:
        """From features [n, d] and probabilities [n, clusters]; of a few ridges the best one.

        ``known`` is ``Eigen.of(features)``, where it is there already.
        """
        kernel = known or Eigen.of(features)
        offset = targets.mean(0)
        above = targets - offset
        along = kernel.vectors.T @ above
        best, chosen = np.inf, (0.0, above)
        for ridge in _RIDGES:
            shrunk = kernel.values / (kernel.values + ridge * kernel.values.mean())
            hat = kernel.vectors**2 @ shrunk + 1 / len(targets)  # the mean is fitted as well
            left_out = above - (above - kernel.vectors @ (shrunk[:, None] * along)) / np.maximum(
                1 - hat[:, None], 1e-6
            )
            error = float(np.square(left_out - above).sum())
            if error < best:
                best, chosen = error, (ridge, left_out)
        ridge, left_out = chosen
        inverse = 1 / (kernel.values + ridge * kernel.values.mean())
        dual = kernel.vectors @ (inverse[:, None] * along)
        weights = (features - kernel.mean).T @ dual
        return cls(kernel.mean, weights, offset, probabilities(left_out + offset))

    def __call__(self, features: Array) -> Array:
        """Probabilities [n, clusters] of features [n, d]."""
        return probabilities((features - self.mean) @ self.weights + self.offset)


@dataclass(frozen=True, eq=False)
class Eigen:
    """The eigenvalues [n] and eigenvectors [n, n] of centred features' inner products."""

    mean: Array
    values: Array
    vectors: Array

    @classmethod
    def of(cls, features: Array) -> Eigen:
        """Of features [n, d]."""
        mean = features.mean(0)
        values, vectors = np.linalg.eigh((features - mean) @ (features - mean).T)
        return cls(mean, np.maximum(values, 0.0), vectors)


def probabilities(scores: Array, least: float = 0.01) -> Array:
    """Regressed indicators [n, clusters] as probabilities, each ``least`` / clusters or more."""
    kept = np.maximum(scores, least / scores.shape[1])
    out: Array = kept / kept.sum(1, keepdims=True)
    return out


def softmax(logits: Array) -> Array:
    """Over the last axis."""
    out: Array = np.exp(logits - logits.max(-1, keepdims=True))
    out /= out.sum(-1, keepdims=True)
    return out


def balanced(logits: Array, balance: float, steps: int = 20) -> Array:
    """Softmax of logits [n, clusters] under a load-balance penalty.

    The penalty balance · E · Σ f_i P_i, f_i and P_i a cluster's share of rows, costs a row of
    cluster i balance · E · f_i: what each is worth where the penalty's gradient vanishes, found
    by damped iteration.
    """
    count = logits.shape[1]
    share = softmax(logits).mean(0)
    for _ in range(steps):
        share = 0.5 * share + 0.5 * softmax(logits - balance * count * share).mean(0)
    return softmax(logits - balance * count * share)


def agreed(
    logits: Array, features: Array, balance: float, rounds: int = 3, most: int = 2000
) -> tuple[Array, TextGate]:
    """Probabilities [n, clusters] by likelihood and text, and the gate that the text has.

    ``logits`` [n, clusters] are of the likelihood. A gate is fitted on the probabilities, what it
    says of each row without that row is the prior of the next ones, ``rounds`` times. It is
    fitted on ``most`` of the rows, spread evenly: its time grows with their third power.
    """
    fitted = np.unique(np.linspace(0, len(logits) - 1, min(most, len(logits))).astype(np.intp))
    kernel = Eigen.of(features[fitted])
    chances = balanced(logits, balance)
    gate = TextGate.fit(features[fitted], chances[fitted], kernel)
    for _ in range(rounds):
        prior = gate(features)
        prior[fitted] = gate.held_out
        chances = balanced(logits + np.log(prior), balance)
        gate = TextGate.fit(features[fitted], chances[fitted], kernel)
    return chances, gate


def merge_cheapest(losses: Array, labels: Ints, count: int) -> list[int]:
    """Join clusters whose rows one adapter can serve, until ``count`` are left; the adapters kept.

    losses [n, clusters] of the rows under every cluster's adapter, labels [n]. A join costs what
    the rows' summed loss rises by when one of the adapters serves all of them; the cheapest is
    next.
    """
    groups = [[c] for c in range(losses.shape[1])]
    total = [losses[labels == c].sum(0) for c in range(losses.shape[1])]

    def cost(i: int, j: int) -> float:
        own = sum(min(total[g][c] for c in groups[g]) for g in (i, j))
        both = total[i] + total[j]
        return float(min(both[c] for c in groups[i] + groups[j]) - own)

    while len(groups) > count:
        pairs = [(i, j) for j in range(len(groups)) for i in range(j)]
        i, j = min(pairs, key=lambda pair: cost(*pair))
        groups[i] += groups.pop(j)
        total[i] = total[i] + total.pop(j)
    return [min(group, key=lambda c: t[c]) for group, t in zip(groups, total, strict=True)]


def distinct(losses: Array, labels: Ints, same: float, least: float = 0.0) -> list[int]:
    """The adapters that are left when of two that are the same the smaller one goes, and then
    those with fewer than ``least`` rows.

    Two are the same when each serves the other's rows nearly as well as the other does: worse by
    less than ``same`` times the median of what rows lose under an adapter that is not theirs. One
    way is not enough: an adapter may know a second task that has an adapter of its own.
    """
    size = losses.shape[1]
    counts = np.bincount(labels, minlength=size)
    kept = [int(c) for c in np.argsort(-counts, kind="stable") if counts[c]]
    means = np.zeros((size, size))
    for c in kept:
        own = losses[labels == c]
        means[c] = (own - own[:, [c]]).mean(0)
    between = [means[i, j] for i in kept for j in kept if i != j]
    limit = same * float(np.median(between)) if between else 0.0
    found: list[int] = []
    for c in kept:
        if all(max(means[c, other], means[other, c]) >= limit for other in found):
            found.append(c)
    return sorted(c for c in found if counts[c] >= least)
