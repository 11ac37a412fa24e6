"""Systems that take turns (A B A B) at the same work, and a row of figures for each."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks import report
from benchmarks.workload import Mixtures, Run, Workload, latencies

OURS = "mora-serve"

Work = Callable[[Sequence[Sequence[int]], Mixtures, int], Run]


@dataclass
class System:
    """Who does the work: ``repeat`` times, with answers of ``tokens`` tokens.

    ``failure`` is why it cannot, and ``whole`` its rates until some numbers of tokens in its first
    run, where later ones may be shorter.
    """

    name: str
    work: Work
    repeat: int = 1
    tokens: int = 64
    runs: list[Run] = field(default_factory=list)
    whole: dict[str, float] = field(default_factory=dict)
    failure: str = ""


def take_turns(
    systems: Sequence[System],
    workload: Workload,
    wanted: Mixtures,
    after: Callable[[System], object] = lambda _: None,
) -> None:
    """Warm each system up, then let them work in turn; runs are added to each.

    Every turn has prompts of its own, the same for all. ``after`` is called with the system after
    each run. A failure of ours is raised; one of a peer is kept, and the others go on.
    """
    for system in systems:
        try:
            system.work(workload.prompts(len(wanted), -2), wanted, min(4, system.tokens))
        except Exception as e:
            if system.name == OURS:
                raise
            system.failure = f"{type(e).__name__}: {e}"[:300]
    for turn in range(max(system.repeat for system in systems)):
        prompts = workload.prompts(len(wanted), turn)
        for system in systems:
            if not system.failure and turn < system.repeat:
                system.runs.append(system.work(prompts, wanted, system.tokens))
                after(system)


def row(described: Mapping[str, Any], system: System, ours: System) -> dict[str, Any]:
    """One system's figures; latencies up to the same number of tokens in every run.

    Rates are of the whole answers: where runs were cut, times what the whole first run's rate was
    to its own until there. Beside them, ours at as many tokens.
    """
    named = {**described, "system": system.name}
    if system.failure:
        found = {**named, "failure": system.failure}
        report.log(f"{_text(named)}: {system.failure}")
        return found
    full, rest = system.tokens, 1.0
    if system.whole:
        full = max(map(int, system.whole))
        rest = system.whole[str(full)] / system.whole[str(system.tokens)]
    rates = [rest * run.rate(system.tokens) for run in system.runs]
    same = [
        a[0] == b[0]
        for mine, theirs in zip(ours.runs, system.runs, strict=False)
        for a, b in zip(mine.tokens, theirs.tokens, strict=True)
    ]
    report.log(
        f"{_text(named)}: {statistics.median(rates):.1f} tokens/s "
        f"({min(rates):.1f}-{max(rates):.1f})"
    )
    return {
        **named,
        "tokens_per_second": statistics.median(rates),
        "least": min(rates),
        "most": max(rates),
        "repetitions": len(rates),
        "new_tokens": system.tokens,
        "by_tokens": system.whole,
        "ours_until_there": statistics.median(run.rate(full) for run in ours.runs),
        **latencies([run.until(system.tokens) for run in system.runs]),
        "same_first_tokens_as_ours": sum(same) / len(same),
    }


def _text(named: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in named.items())
