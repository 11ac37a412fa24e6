"""Pictures of routing, each from the figures of ``router_training.evaluation``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from router_training.report.style import COLOURS, INK, MARKS, MUTED, OURS, panels, share_limits

Figures = Mapping[str, Any]


def top_k(single: Mapping[str, Figures]) -> Any:
    """Top-1 by adapter, and the mean over adapters of top-1 to top-4, by method."""
    names = list(single[OURS]["by_adapter"])
    figure, (left, right) = panels(
        9, 0.26 * len(names) + 1.6, 2, gridspec_kw={"width_ratios": [3, 2]}
    )
    rows = np.arange(len(names))
    seen = []
    for method in reversed(list(single)):
        tops = [single[method]["by_adapter"].get(n, {"top": [np.nan]})["top"][0] for n in names]
        seen += [t for t in tops if t == t]
        left.plot(tops, rows, MARKS[method], **_mark(method), label=method)
    left.set_yticks(rows, names)
    left.invert_yaxis()
    left.set_xlim(*share_limits(seen))
    left.set_xlabel("share of prompts")
    left.set_title("the right adapter scores best")
    means = [single[method]["top"] for method in single]
    for method, top in reversed(list(zip(single, means, strict=True))):
        right.plot(range(1, len(top) + 1), top, "-" + MARKS[method], **_mark(method), label=method)
    right.set_xticks(range(1, 1 + max(map(len, means))))
    right.set_ylim(*share_limits([v for top in means for v in top]))
    right.set_xlabel("k")
    right.set_title("it is among the best k")
    _legend(right, "lower right")
    return figure


def confusion(table: Figures) -> Any:
    """Which adapter runs first for the prompts of each; the last column is the base alone."""
    values = np.array(table["rows"])
    size = 0.42 * len(table["ran"]) + 2.2
    figure, (axis,) = panels(size, 0.9 * size - 0.4)
    axis.grid(visible=False)
    axis.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(table["ran"])), table["ran"], rotation=60, ha="right")
    axis.set_yticks(range(len(table["right"])), table["right"])
    axis.set_xlabel("runs first")
    axis.set_ylabel("the prompt is for")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value >= 0.005:
                colour = "white" if value > 0.6 else INK
                axis.text(
                    j, i, f"{100 * value:.0f}", ha="center", va="center", color=colour, size=8
                )
    axis.axvline(len(table["ran"]) - 1.5, color=MUTED, lw=1)
    return figure


def reliability(curves: Mapping[str, Figures]) -> Any:
    """Mean probability of equal-mass bins against how often the best candidate is right."""
    figure, (axis,) = panels(5.4, 4.6)
    axis.plot([0, 1], [0, 1], color=MUTED, lw=1, ls="--")
    for method in reversed(list(curves)):
        bins = curves[method]["bins"]
        x, y = [b["probability"] for b in bins], [b["right"] for b in bins]
        label = f"{method}: error {curves[method]['error']:.3f}"
        axis.plot(x, y, "-" + MARKS[method], **_mark(method), label=label)
    axis.set_xlim(-0.03, 1.03)
    axis.set_ylim(-0.03, 1.03)
    axis.set_aspect("equal")
    axis.set_xlabel("probability of the best candidate")
    axis.set_ylabel("share of prompts where it is right")
    _legend(axis, "upper left")
    return figure


def examples(later: Mapping[str, Figures]) -> Any:
    """Accuracy for adapters that the fitting has not seen, by their number of examples."""
    figure, (axis,) = panels(6, 4)
    ticks: list[int] = []
    for method in reversed(list(later)):
        rows = later[method]["by_count"]
        counts = [int(n) for n in rows]
        ticks = max(ticks, counts, key=len)
        middle = [row["mean"] for row in rows.values()]
        low = [row["lowest_draw"] for row in rows.values()]
        high = [row["highest_draw"] for row in rows.values()]
        axis.fill_between(counts, low, high, color=COLOURS[method], alpha=0.15, lw=0)
        axis.plot(counts, middle, "-" + MARKS[method], **_mark(method), label=method)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(n) for n in ticks])
    axis.minorticks_off()
    axis.set_ylim(*share_limits([0.0]))
    axis.set_xlabel("example prompts of the new adapter")
    axis.set_ylabel("it scores best for its prompts")
    _legend(axis, "lower right")
    return figure


def held_out(later: Mapping[str, Figures]) -> Any:
    """Accuracy by adapter, each held out of the fitting once."""
    names = list(later[OURS]["by_adapter"])
    figure, (axis,) = panels(6.4, 0.26 * len(names) + 1.4)
    rows = np.arange(len(names))
    seen = []
    for method in reversed(list(later)):
        values = [later[method]["by_adapter"][name] for name in names]
        seen += values
        axis.plot(values, rows, MARKS[method], **_mark(method), label=method)
    axis.set_yticks(rows, names)
    axis.invert_yaxis()
    axis.set_xlim(*share_limits(seen))
    axis.set_xlabel("share of its prompts for which it scores best")
    _beside(axis)
    return figure


def wordings(accuracy: Mapping[str, Sequence[float]], kinds: Sequence[str]) -> Any:
    """Top-1 by method for each kind of wording."""
    figure, (axis,) = panels(7.6, 3.6)
    width = 0.8 / len(accuracy)
    for i, (method, values) in enumerate(accuracy.items()):
        at = np.arange(len(kinds)) + (i - (len(accuracy) - 1) / 2) * width
        axis.bar(at, values, 0.9 * width, color=COLOURS[method], label=method)
        for x, value in zip(at, values, strict=True):
            label = f"{value:.2f}".lstrip("0")
            axis.text(x, value + 0.015, label, ha="center", size=7.5)
    axis.set_xticks(range(len(kinds)), kinds)
    axis.tick_params(axis="x", length=0)
    axis.grid(visible=False, axis="x")
    axis.set_ylim(0, 1.08)
    axis.set_yticks(np.arange(0, 1.01, 0.2))
    axis.set_ylabel("the right adapter scores best")
    _beside(axis)
    return figure


def roc_curves(curves: Mapping[str, Mapping[str, Figures]], titles: Mapping[str, str]) -> Any:
    """For each kind of prompt of nobody, how many of them are taken for how many of ours."""
    figure, axes = panels(4.4 * len(titles), 4.2, len(titles))
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        axis.plot([0, 1], [0, 1], color=MUTED, lw=1, ls="--")
        for method in reversed(list(curves)):
            curve = curves[method][kind]
            axis.plot(
                curve["false"],
                curve["true"],
                color=COLOURS[method],
                lw=2.2 if method == OURS else 1.4,
                label=f"{method} {curve['auroc']:.3f}",
                zorder=3 if method == OURS else 2,
            )
        axis.set_xlim(-0.02, 1.02)
        axis.set_ylim(-0.02, 1.02)
        axis.set_aspect("equal")
        axis.set_title(title)
        axis.set_xlabel("prompts of nobody taken for an adapter's")
        handles, labels = axis.get_legend_handles_labels()
        axis.legend(handles[::-1], labels[::-1], loc="lower right", title="area under the curve")
    axes[0].set_ylabel("prompts of adapters taken for such")
    return figure


def _mark(method: str) -> dict[str, Any]:
    ours = method == OURS
    return {
        "color": COLOURS[method],
        "ms": 7 if ours else 5,
        "lw": 2 if ours else 1.3,
        "alpha": 1 if ours else 0.85,
        "mec": "white",
        "mew": 0.6,
        "zorder": 4 if ours else 3,
        "clip_on": False,
    }


def _legend(axis: Any, place: str) -> None:
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], loc=place)


def _beside(axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    bars = hasattr(handles[0], "patches")  # those are drawn in order, marks the last on top
    order = slice(None) if bars else slice(None, None, -1)
    axis.legend(handles[order], labels[order], loc="upper left", bbox_to_anchor=(1, 1))
