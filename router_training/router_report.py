"""What a fit of the router measured, and how such figures are computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mora_serve.router.decide import Choice, decide
from mora_serve.router.format import Calibration
from router_training.gates import WEIGHTS, Case

Array = npt.NDArray[np.float64]

BINS = 15


@dataclass(frozen=True)
class FitReport:
    """What the fit measured, on prompts that μ and Σ were not learnt from.

    The fit has seen some of them all the same. A learnt correction ends its training by the kept
    prompts, which ``known``, ``alone``, ``together`` and ``abstained`` are of as well; the gates
    and the threshold are fitted on all that the figures from ``known`` on are of.

    ``strength`` is λ, ``blend`` the prototypes' part in a score: those with the best mean of
    ``held_out``; ``tried`` has that mean for each combination, and with the learnt correction,
    which is in the file where ``corrected``.
    ``held_out[n]``: top-1 accuracy among all adapters for adapters kept out of the fit, with
    keys from n prompts, cross-validated; ``known``: that of the adapters learnt from.
    ``alone``, ``together``: the share of prompts for one adapter, or for several, for which
    exactly those would run.
    ``auroc_near``, ``auroc_far``: the abstention score's, prompts with a right adapter against
    those without. ``abstained``: the share of the former that get the base; ``accepted_near``,
    ``accepted_far``: that of the latter which get an adapter. A figure is NaN where the data
    have no such prompts.
    ``calibration_error``: of the best candidate's probability, over bins of equal mass. From
    ``known`` on, the gates are not those of the file, which are fitted on all of these prompts,
    but two fits on a half each, measured on the other half.
    """

    strength: float
    blend: float
    corrected: bool
    held_out: Mapping[int, float]
    known: float
    alone: float
    together: float
    auroc_near: float
    auroc_far: float
    abstained: float
    accepted_near: float
    accepted_far: float
    calibration_error: float
    tried: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """Flat, as the router's file holds it; figures that could not be measured left out."""
        out: dict[str, float] = {}
        for name, value in dataclasses.asdict(self).items():
            values = value if isinstance(value, dict) else {"": value}
            out |= {f"{name}_{n}".rstrip("_"): float(v) for n, v in values.items()}
        return {name: value for name, value in out.items() if np.isfinite(value)}


def decision_figures(cases: Sequence[Case], calibration: Calibration) -> dict[str, float]:
    """``known`` and what follows it in FitReport, without ``tried``, for cases of the kinds
    known, new, mixture, near and far."""
    most = max(2, *(len(case.right) for case in cases))
    judged = [(case, decide(case.seen, calibration, most)) for case in cases]

    def of(*kinds: str) -> list[tuple[Case, Choice]]:
        return [(case, choice) for case, choice in judged if case.kind in kinds]

    def best(*kinds: str) -> list[float]:
        return [choice.candidates[0].probability for _, choice in of(*kinds)]

    inside = ("known", "new", "mixture")
    return {
        "known": _share(_top(*pair) for pair in of("known")),
        "alone": _share(set(choice.adapters) == case.right for case, choice in of("known", "new")),
        "together": _share(set(choice.adapters) == case.right for case, choice in of("mixture")),
        "auroc_near": auroc(best(*inside), best("near")),
        "auroc_far": auroc(best(*inside), best("far")),
        "abstained": _share(not choice.adapters for _, choice in of(*inside)),
        "accepted_near": _share(bool(choice.adapters) for _, choice in of("near")),
        "accepted_far": _share(bool(choice.adapters) for _, choice in of("far")),
        "calibration_error": calibration_error(
            best(*WEIGHTS),
            [_top(*pair) for pair in of(*WEIGHTS)],
            [case.weight for case, _ in of(*WEIGHTS)],
        ),
    }


def _top(case: Case, choice: Choice) -> bool:
    return choice.candidates[0].adapter in case.right


def _share(holds: Iterable[bool]) -> float:
    found = list(holds)
    return sum(found) / len(found) if found else float("nan")


def auroc(inside: npt.ArrayLike, outside: npt.ArrayLike) -> float:
    """The probability that an inside score is above an outside one; ties count half."""
    a, b = np.asarray(inside, float), np.sort(np.asarray(outside, float))
    if not len(a) or not len(b):
        return float("nan")
    below = np.searchsorted(b, a, "left") + np.searchsorted(b, a, "right")
    return float(below.mean() / (2 * len(b)))


def calibration_error(
    probability: Sequence[float],
    right: Sequence[bool],
    weight: Sequence[float] | None = None,
    bins: int = BINS,
) -> float:
    """The mean gap between probability and frequency over ``bins`` bins of equal mass."""
    p, y = np.asarray(probability, float), np.asarray(right, float)
    share = np.ones(len(p)) if weight is None else np.asarray(weight, float)
    order = np.argsort(p, kind="stable")
    before = np.cumsum(share[order]) - share[order]
    bin_of = np.minimum((before / share.sum() * bins).astype(int), bins - 1)
    gaps = np.bincount(bin_of, (share * (p - y))[order], bins)
    return float(np.abs(gaps).sum() / share.sum())
