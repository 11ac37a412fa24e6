"""Pictures of what the models answer, each from the figures of ``router_training.evaluation``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from router_training.report.style import COLOURS, INK, MUTED, OURS, PALE, panels, share_limits

Figures = Mapping[str, Any]

_RIGHT, _WRONG, _OTHER = COLOURS[OURS], COLOURS["MLP"], COLOURS["centroids"]


def by_adapter(rows: Mapping[str, Figures]) -> Any:
    """Exact match of each adapter under the right mixture, the routed one and none."""
    names = list(rows)
    figure, axes = panels(9, 0.26 * len(names) + 1.4, 2, sharey=True)
    at = np.arange(len(names))
    titles = {"new_prompts": "trained templates, new prompts", "new_templates": "kept templates"}
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        for column, label, mark, colour in (
            ("base", "base alone", "x", MUTED),
            (kind, "right adapter", "o", _RIGHT),
            (f"{kind}_routed", "routed", "|", INK),
        ):
            values = [rows[name][column] for name in names]
            size = 11 if mark == "|" else 7
            edge = {"mec": "white", "mew": 0.6} if mark == "o" else {"mew": 2}
            axis.plot(values, at, mark, color=colour, ms=size, label=label, clip_on=False, **edge)
        axis.set_yticks(at, names)
        axis.set_xlim(*share_limits([0.0]))
        axis.set_xlabel("share of answers that are right")
        axis.set_title(title)
    axes[0].invert_yaxis()
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def pairs(panel: Mapping[str, Sequence[Figures]]) -> Any:
    """Exact match of pairs: first adapter by second; pairs never trained together are framed."""
    from matplotlib.patches import Rectangle

    rows = next(iter(panel.values()))
    first = list(dict.fromkeys(row["adapters"][0] for row in rows))
    second = list(dict.fromkeys(row["adapters"][1] for row in rows))
    width = 1.5 + len(panel) * (0.75 * len(second) + 0.4)
    figure, axes = panels(width, 0.36 * len(first) + 1.3, len(panel), sharey=True)
    image = None
    for axis, (title, cells) in zip(axes, panel.items(), strict=True):
        values = np.full((len(first), len(second)), np.nan)
        for cell in cells:
            i, j = first.index(cell["adapters"][0]), second.index(cell["adapters"][1])
            values[i, j] = cell["right"]
            if not cell["trained"]:
                frame = Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, fill=False, ec=_WRONG, lw=2)
                axis.add_patch(frame)
        axis.grid(visible=False)
        image = axis.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                colour = INK if value > 0.55 else "white"
                axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=colour)
        axis.set_xticks(range(len(second)), second)
        axis.set_yticks(range(len(first)), first)
        axis.tick_params(length=0)
        axis.set_title(title)
    figure.colorbar(image, ax=axes, label="share right", shrink=0.8)
    return figure


def mixtures(rows: Sequence[tuple[str, float, float]]) -> Any:
    """Exact match of prompts for a pair under what one could run: (label, trained, held out).

    A value that is NaN has no bar.
    """
    figure, (axis,) = panels(7.6, 0.48 * len(rows) + 1.2)
    at = np.arange(len(rows))
    parts = {
        "trained together": (-0.19, _RIGHT, [trained for _, trained, _ in rows]),
        "never trained together": (0.19, _OTHER, [held_out for _, _, held_out in rows]),
    }
    for label, (shift, colour, values) in parts.items():
        axis.barh(at + shift, np.nan_to_num(values), 0.36, color=colour, label=label)
        for y, value in zip(at + shift, values, strict=True):
            if value == value:
                axis.text(value + 0.01, y, f"{value:.3f}", va="center", size=8)
    axis.set_yticks(at, [row[0] for row in rows])
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set_xlim(0, 1.1)
    axis.set_xticks(np.arange(0, 1.01, 0.2))
    axis.set_xlabel("share of prompts whose whole answer is right")
    axis.legend(loc="lower right")
    return figure


def beside_wrong(rows: Mapping[str, Figures], weight: float) -> Any:
    """Exact match of each adapter alone and with a wrong one beside it."""
    names = list(rows)
    figure, (axis,) = panels(7.6, 0.26 * len(names) + 1.4)
    at = np.arange(len(names))
    alone = [rows[name]["alone"] for name in names]
    beside = [rows[name]["beside"] for name in names]
    axis.hlines(at, beside, alone, color=PALE, lw=3, zorder=1)
    options = {"ms": 7, "mec": "white", "mew": 0.6, "clip_on": False}
    axis.plot(alone, at, "o", color=_RIGHT, label="alone", **options)
    axis.plot(beside, at, "D", color=_WRONG, label=f"beside a wrong one at {weight}", **options)
    axis.set_yticks(at, names)
    axis.invert_yaxis()
    axis.set_xlim(*share_limits([*alone, *beside]))
    axis.set_xlabel("share of prompts whose whole answer is right")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def key_map(points: Figures) -> Any:
    """Keys (labelled) and prompts in the plane of ``evaluation.keymap``."""
    from matplotlib import colormaps

    figure, (axis,) = panels(8.2, 6.6)
    for name, mark, colour in (("far", "x", MUTED), ("near", "+", INK)):
        if points[name]:
            x, y = np.array(points[name]).T
            label = f"for no adapter, {name}"
            axis.scatter(x, y, s=26, marker=mark, color=colour, lw=1, alpha=0.7, label=label)
    palette = colormaps["tab20"]
    for i, (name, key) in enumerate(points["keys"].items()):
        own = palette(i % palette.N)
        prompts = np.array(points["prompts"].get(name, [])).reshape(-1, 2)
        axis.plot(*zip(*_spokes(key, prompts), strict=True), color=own, lw=0.6, alpha=0.6)
        axis.scatter(*prompts.T, s=14, color=own, alpha=0.85, lw=0)
        axis.scatter(*key, s=90, marker="*", color=own, ec=INK, lw=0.7, zorder=4)
        axis.annotate(
            name,
            key,
            textcoords="offset points",
            xytext=(7, 5),
            size=9,
            zorder=5,
            bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 1},
        )
    axis.set_aspect("equal")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(visible=False)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)
    axis.legend(loc="best")
    return figure


def _spokes(key: Sequence[float], prompts: Any) -> list[Any]:
    """One path from the key to each prompt and back."""
    path = [list(key)]
    for prompt in prompts:
        path += [list(prompt), list(key)]
    return path


def latency(rows: Sequence[Figures]) -> Any:
    """Median milliseconds a decision by the number of adapters, and where they go."""
    figure, (axis,) = panels(6, 3.8)
    counts = [row["adapters"] for row in rows]
    for key, label, mark, colour in (
        ("decision_ms", "whole decision", "o", _RIGHT),
        ("features_ms", "features of the prompt", "s", _OTHER),
    ):
        axis.plot(counts, [row[key] for row in rows], "-" + mark, color=colour, label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("registered adapters")
    axis.set_ylabel("milliseconds")
    axis.set_xticks(counts, [f"{n:,}" for n in counts])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.minorticks_off()
    axis.legend(loc="upper left")
    return figure
