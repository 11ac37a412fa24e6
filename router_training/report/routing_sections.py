"""The sections on routing: what each picture shows, how to read it, its figures as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from router_training.report import routing_figures as draw
from router_training.report.cells import dig, share
from router_training.report.page import Section, Table
from router_training.report.style import OURS, as_image

Figures = Mapping[str, Any]


def routing_sections(figures: Figures, baselines: Figures) -> list[Section]:
    """In reading order; ``figures`` as ``evaluation.bundle.measure`` gives them."""
    methods: dict[str, Figures] = {OURS: figures, **baselines}
    out = [_top_k(methods), _confusion(figures)]
    if figures.get("calibration"):
        out.append(_reliability(methods))
    if "later" in figures:
        out += [_examples(methods), _held_out(methods)]
    out.append(_wordings(methods))
    if dig(figures, "routing.roc"):
        out.append(_roc(methods))
    return out


def _having(methods: Mapping[str, Figures], path: str) -> dict[str, Any]:
    found = {name: dig(method, path) for name, method in methods.items()}
    return {name: value for name, value in found.items() if value}


def _prompts(methods: Mapping[str, Figures], path: str) -> str:
    counts = {name: dig(m, path) for name, m in methods.items()}
    by_count: dict[int, list[str]] = {}
    for name, count in counts.items():
        if count:
            by_count.setdefault(count, []).append(name)
    return "; ".join(f"{n} prompts: {', '.join(names)}" for n, names in by_count.items())


def _top_k(methods: Mapping[str, Figures]) -> Section:
    single = _having(methods, "routing.single")
    names = list(single[OURS]["by_adapter"])
    most = len(single[OURS]["top"])
    others = [m for m in single if m != OURS]

    def row(name: str, of: str | None) -> list[str]:
        found = {m: s if of is None else s["by_adapter"][of] for m, s in single.items()}
        tops = [*found[OURS]["top"], found[OURS]["alone"]]
        return [name, *map(share, tops), *(share(found[m]["top"][0]) for m in others)]

    rows = [*(row(name, name) for name in names), row("mean", None)]
    head = ["prompts for", *(f"top {k}" for k in range(1, most + 1)), "it alone runs"]
    return Section(
        "Is the right adapter on top?",
        "Prompts for one adapter each, in templates kept out of all training, with all adapters "
        "registered. On the left how often the right adapter scores best, on the right how often "
        "it is among the best k.",
        "Further right (left picture) and further up (right picture) is better. A mark that "
        "hides another lies on the same value.",
        as_image(draw.top_k(single)),
        tables=[
            Table(
                [*head, *(f"{m}: top 1" for m in others)],
                rows,
                f"{OURS}, and the others' top 1. {_prompts(single, 'prompts')}.",
                totals=1,
            )
        ],
    )


def _confusion(figures: Figures) -> Section:
    table = dig(figures, "routing.single.confusion")
    mistakes = sorted(
        (
            (value, right, ran)
            for right, row in zip(table["right"], table["rows"], strict=True)
            for ran, value in zip(table["ran"], row, strict=True)
            if right != ran and value > 0
        ),
        reverse=True,
    )
    return Section(
        "Who is taken for whom?",
        "The same prompts by the adapter that would run first. The last column stands for "
        "abstention: no adapter fits and the base answers alone.",
        "A row adds up to 100 %. On the diagonal is what went right; a number elsewhere says which "
        "adapter took the prompts of the row's.",
        as_image(draw.confusion(table)),
        tables=[
            Table(
                ["prompts for", "share", "went to"],
                [[right, share(value), ran] for value, right, ran in mistakes[:8]],
                "The most frequent mistakes.",
                text=(2,),
            )
        ]
        if mistakes
        else [],
    )


def _reliability(methods: Mapping[str, Figures]) -> Section:
    curves = _having(methods, "calibration")
    return Section(
        "Do the probabilities mean what they say?",
        "For equal numbers of prompts of four kinds (trained templates; kept templates and new "
        "sentences; adapters registered later, each from 16 examples; near-domain prompts of no "
        "adapter), the probability of the best candidate against how often it is right. Bins hold "
        "equally many prompts.",
        "On the dashed line a probability of 0.7 is right in 70 % of cases; below it the router "
        "is too sure, above it too modest. The calibration error is the mean distance from the "
        "line over prompts.",
        as_image(draw.reliability(curves)),
        tables=[
            Table(
                ["", "best candidate", "every candidate above 0.01", "prompts"],
                [
                    [name, share(c["error"]), share(c["every"]), str(c["prompts"])]
                    for name, c in curves.items()
                ],
                "Calibration error. Centroids, Arrow and X-LoRA give no probabilities.",
            )
        ],
    )


def _examples(methods: Mapping[str, Figures]) -> Section:
    measured = _having(methods, "later")
    later = {n: v for n, v in measured.items() if len(v["by_count"]) > 1}
    counts = list(later[OURS]["by_count"])
    rows = []
    for name, value in later.items():
        row = value["by_count"]
        rows.append([name, *(share(row[n]["mean"]) for n in counts if n in row)])
    rows += [
        [f"{OURS}, least adapter"]
        + [share(later[OURS]["by_count"][n]["least_adapter"]) for n in counts]
    ]
    ours = later[OURS]
    others = ", ".join(name for name in measured if name not in later)
    at_most = f" Measured with {ours['examples']} alone, in the next section: {others}."
    return Section(
        "How many examples does a new adapter need?",
        f"Every adapter is left out of the fitting once ({ours['folds']} fits, each without a part "
        "of them), then registered beside all others with a few example prompts. Its prompts come "
        "in templates that none of this has seen.",
        f"The line is the mean over adapters and {ours['draws']} choices of the examples, the band "
        "the range of these choices' means. Logistic regression is trained anew for each newcomer; "
        f"{OURS} and the centroids only add a key.{at_most if others else ''}",
        as_image(draw.examples(later)),
        tables=[Table(["example prompts", *counts], rows)],
    )


def _held_out(methods: Mapping[str, Figures]) -> Section:
    later = _having(methods, "later")
    names = list(later[OURS]["by_adapter"])
    rows = [[name, *(share(m["by_adapter"][name]) for m in later.values())] for name in names]
    rows.append(["mean", *(share(m["top1"]) for m in later.values())])
    return Section(
        "Adapters that the fitting never saw",
        f"The same by adapter, with {later[OURS]['examples']} examples each.",
        "A mark far to the left is an adapter whose examples do not set it apart from the others.",
        as_image(draw.held_out(later)),
        tables=[Table(["held out", *later], rows, totals=1)],
    )


def _wordings(methods: Mapping[str, Figures]) -> Section:
    kinds = {
        "single": "kept templates",
        "reworded": "new sentences,\nhalf of the words known",
        "new_words": "new sentences,\nother words",
    }
    kinds = {k: label for k, label in kinds.items() if dig(methods[OURS], f"routing.{k}")}
    accuracy = {
        name: [dig(method, f"routing.{kind}.top")[0] for kind in kinds]
        for name, method in methods.items()
        if dig(method, "routing.single")
    }
    return Section(
        "Other words for the same thing",
        "Templates that are other expansions of the training's patterns, new sentences of whose "
        "content words at least half stand in the training templates of the task, and new "
        "sentences with other words.",
        "Higher is better. What shares no word with any example cannot be found by letters and "
        "words; only a router that understands the prompt could.",
        as_image(draw.wordings(accuracy, list(kinds.values()))),
        tables=[
            Table(
                ["top 1", *(label.replace("\n", " ") for label in kinds.values())],
                [[name, *map(share, values)] for name, values in accuracy.items()],
                "; ".join(
                    f"{label.replace(chr(10), ' ')}: {_prompts(methods, f'routing.{kind}.prompts')}"
                    for kind, label in kinds.items()
                ),
            )
        ],
    )


def _roc(methods: Mapping[str, Figures]) -> Section:
    curves = _having(methods, "routing.roc")
    titles = {
        "far": "far: prose, sums, code",
        "near": "near: other tasks in the same wording",
    }
    titles = {kind: title for kind, title in titles.items() if kind in curves[OURS]}
    ours = curves[OURS]
    accepted: Sequence[str] = [
        f"of the {kind} prompts an adapter gets {share(ours[kind]['accepted'])}" for kind in titles
    ]
    return Section(
        "Does the router know when a prompt is nobody's?",
        "Prompts of all adapters and pairs against prompts that no adapter serves, from generators "
        "that no fitting has used: far from the adapters' domain, and near it.",
        "Up and left is better: more prompts of adapters found at the cost of fewer others. The "
        f"dashed line is guessing. At the threshold that {OURS} runs with, "
        f"{' and '.join(accepted)}, and {share(dig(methods[OURS], 'routing.abstained'))} of the "
        "prompts of adapters get the base. The others have no threshold; how sure they are of "
        "their best candidate stands for a score.",
        as_image(draw.roc_curves(curves, titles)),
        tables=[
            Table(
                ["area under the curve", *titles.values()],
                [[m, *(share(curves[m][k]["auroc"]) for k in titles)] for m in curves],
                f"Prompts of nobody, of each kind: {_prompts(curves, 'far.prompts')}.",
            )
        ],
    )
