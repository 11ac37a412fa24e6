"""From evidence to a decision: abstain, or run the adapters that the prompt asks for."""

from __future__ import annotations

from typing import NamedTuple

from mora_serve.core import Candidate
from mora_serve.router.evidence import Evidence
from mora_serve.router.format import Calibration
from mora_serve.router.gate import probabilities

REPORTED = 16  # candidates in a decision, unless more adapters may run


class Choice(NamedTuple):
    """What the router picks, best first (nothing where it abstains), and the best candidates."""

    adapters: tuple[str, ...]
    candidates: tuple[Candidate, ...]


def decide(seen: Evidence | None, calibration: Calibration, max_adapters: int) -> Choice:
    """Pick at most ``max_adapters`` adapters.

    It abstains where the best candidate's probability is below the threshold. Otherwise that one
    runs, and with it others whose probability is above 0.5, likeliest first, one of each
    non-empty group: near ties in a group are ways to do one thing.
    """
    if seen is None:
        return Choice((), ())
    likely, score = probabilities(seen, calibration), seen.score
    rows = zip((-likely).tolist(), (-score).tolist(), seen.names, seen.groups, strict=True)
    ranked = [next(rows), *sorted(rows)]
    reported = ranked[: max(REPORTED, max_adapters)]
    candidates = tuple(Candidate(name, -s, -p) for p, s, name, _ in reported)
    if candidates[0].probability < calibration.threshold:
        return Choice((), candidates)
    chosen: list[str] = []
    groups: set[str] = set()
    for opposed, _, name, group in ranked:
        if chosen and (-opposed <= 0.5 or group in groups):
            continue
        chosen.append(name)
        groups |= {group} - {""}
        if len(chosen) == max_adapters:
            break
    return Choice(tuple(chosen), candidates)
