"""The first section: headline figures beside their baselines and goals; and the methods' table."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from router_training.report.cells import NONE, dig, number, share
from router_training.report.page import Section, Table
from router_training.report.style import OURS

Figures = Mapping[str, Any]
_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = MappingProxyType(
    {">=": operator.ge, "<=": operator.le}
)
_SIGNS = MappingProxyType({">=": "at least", "<=": "at most"})


@dataclass(frozen=True)
class Headline:
    """A figure of the summary and what it is to reach; ``compare`` is ``>=`` or ``<=``.

    ``figure`` and ``baselines`` (label -> path) are dotted paths into the whole result.
    """

    label: str
    figure: str
    compare: str = ""
    goal: float | None = None
    baselines: Mapping[str, str] = field(default_factory=dict)


def overview(result: Figures, headlines: Sequence[Headline]) -> Section:
    """Every headline figure that the result has."""
    rows: list[list[str]] = []
    short: set[tuple[int, int]] = set()
    for headline in headlines:
        value = dig(result, headline.figure)
        if value is None:
            continue
        goal = NONE
        if headline.goal is not None:
            goal = f"{_SIGNS[headline.compare]} {headline.goal:.2f}"
            if not _COMPARISONS[headline.compare](value, headline.goal):
                short.add((len(rows), 1))
        beside = {label: dig(result, path) for label, path in headline.baselines.items()}
        found = ", ".join(f"{label} {share(v)}" for label, v in beside.items() if v is not None)
        rows.append([headline.label, share(value), goal, found or NONE])
    missed = f"{len(short)} of the figures fall short of their goal (in colour)."
    return Section(
        "At a glance",
        "The figures that matter most, each beside others that it is to be read with; the sections "
        "below say on which prompts each was measured.",
        missed if short else "All figures with a goal reach it.",
        tables=[
            Table(
                ["", "measured", "goal", "beside it"],
                rows,
                text=(3,),
                short=frozenset(short),
            )
        ],
    )


_CANNOT = {
    "later": {
        "X-LoRA": "cannot: a fixed set",
    },
    "quality": {
        "centroids": "one adapter: as top 1",
        "logistic regression": "one adapter: as top 1",
        "MLP": "one adapter: as top 1",
    },
}
_NOTES = (
    "Logistic regression and the MLP see all prompts that a router is fitted on: for one adapter, "
    "for two (two labels) and for none (no label). They are trained anew for every adapter that "
    "joins. Centroids are the means of the prompts for one adapter. All three pick one adapter "
    "here: no threshold was fitted for them.",
    "Arrow needs no examples: a new adapter counts like a known one. It computes every adapter's "
    "product for every token, and its weights sum to 1, so two adapters never both run at 1.",
    "X-LoRA runs a first pass without adapters for every token, refuses a key/value cache, and its "
    "gates sum to 1 too. It swaps plain linears only, none in NF4: both ran on a copy of the base "
    "with its 4-bit weights written out in fp32.",
)


def comparison(result: Figures, baselines: Figures) -> Section:
    """All methods on all counts, with a reason where one cannot."""
    sections = result["sections"]
    routed = dig(result, "ours_on_few.routed") or {}
    ours = {**sections, "quality": routed, "fitted_on": len(sections["known"])}
    methods = {OURS: ours, **baselines}
    routing = {
        "known adapters, top 1": "routing.known_top1",
        "new sentences, top 1": "routing.reworded.top",
        "both of a pair on top": "routing.pairs.both_on_top",
        "far prompts, AUROC": "routing.roc.far.auroc",
        "near prompts, AUROC": "routing.roc.near.auroc",
    }
    answers = {
        "one adapter": "quality.single",
        "pairs trained together": "quality.pairs_trained",
        "pairs never trained together": "quality.pairs_held_out",
    }
    rows = []
    for label, path in routing.items():
        rows.append([label, *(_cell(dig(m, path)) for m in methods.values())])
    later = [
        _CANNOT["later"].get(name) or _cell(dig(m, "later.top1")) for name, m in methods.items()
    ]
    rows.insert(1, ["adapters registered later (16 examples), top 1", *later])
    for label, path in answers.items():
        cells = [_CANNOT["quality"].get(name) or _cell(dig(m, path)) for name, m in methods.items()]
        rows.append([f"answers right: {label}", *cells])
    rows.append(["adapters fitted on", *(_fitted_on(m) for m in methods.values())])
    rows.append(["seconds to fit", *(_seconds(m) for m in methods.values())])
    rows.append(["to take in one adapter", *(_taking_in(n, m) for n, m in methods.items())])
    rows.append(["to route a prompt", *(_routing_time(n, m) for n, m in methods.items())])
    few = dig(result, "ours_on_few.prompts")
    return Section(
        "Beside other ways to route",
        " ".join(_NOTES),
        "Arrow, X-LoRA and all answers of this table: "
        f"{few} prompts a task and pair, kept templates. The rest: {sections['prompts']}. "
        f"Adapters that {OURS} was not fitted on are told to it by the examples on their cards.",
        tables=[Table(["", *methods], rows)],
    )


def _cell(value: Any) -> str:
    return share(value[0] if isinstance(value, Sequence) else value)


def _fitted_on(method: Figures) -> str:
    return str(method["fitted_on"] or "none")


def _seconds(method: Figures) -> str:
    return number(method.get("fit_seconds") or None)


def _taking_in(name: str, method: Figures) -> str:
    if name == "X-LoRA":
        return "trained anew"
    if name == "Arrow":
        return "a singular vector a linear"
    if name in (OURS, "centroids"):
        return f"{number(method.get('join_ms'))} ms"
    return f"{number(method['fit_seconds'])} s, trained anew"


def _routing_time(name: str, method: Figures) -> str:
    if "plain_seconds" in method:
        return f"{method['seconds'] / method['plain_seconds']:.1f}x a plain pass"
    if name == OURS:
        return f"{number(method['latency'][0]['decision_ms'])} ms"
    return f"{number(method['milliseconds'])} ms"
