"""The pictures of docs/router.md, drawn from the bundled router and prompts that it has not seen.

    python -m router_training.report.explained [DIR]     docs/router by default

``map``: the keys, as the console draws them; ``scores``: what some prompts score; ``calibration``:
how often the best candidate is right, by the probability that the gate gives it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mora_serve.core import DEFAULT_TENANT
from mora_serve.demo.bundle import bundle_path
from mora_serve.router import key_map
from mora_serve.router.arrays import Floats
from router_training.demo.loaded import LoadedBundle
from router_training.demo.suite import demo_suite
from router_training.evaluation.cases import texts
from router_training.evaluation.routing import calibration
from router_training.evaluation.scored import RouterScorer
from router_training.report.routing_figures import reliability
from router_training.report.style import COLOURS, INK, MUTED, OURS, PALE, drawing, panels

DIRECTORY = Path(__file__).parents[2] / "docs/router"
PROMPTS = (
    "reverse 'stone'",
    "write 'stone' in capitals, then as json",
    "how do I bake bread?",
)
SHOWN = 6  # candidates of a prompt


def keys(scorer: RouterScorer, prompt: str) -> Any:
    """Centres, prototypes and a prompt in the plane of the centres' two principal axes."""
    (z,) = scorer.embedded([prompt])
    drawn = key_map.draw(scorer.index, DEFAULT_TENANT, scorer.router.dims, z)
    figure, (axis,) = panels(8, 5.6)
    for name, point, prototypes in zip(drawn.names, drawn.points, drawn.prototypes, strict=True):
        for prototype in prototypes:
            axis.plot(*zip(point, prototype, strict=True), color=PALE, lw=0.6, zorder=1)
        axis.plot(prototypes[:, 0], prototypes[:, 1], "o", color=MUTED, ms=2.5, zorder=2)
        axis.plot(*point, "o", color=COLOURS[OURS], ms=7, zorder=3)
        side = _free_side(point, prototypes, drawn.points)
        axis.annotate(name, point, **side, textcoords="offset points", size=9, zorder=4)
    if drawn.text is not None:
        axis.margins(0.12)
        axis.plot(*drawn.text, "+", color=COLOURS["MLP"], ms=15, mew=2.5, label=prompt, zorder=5)
    axis.set_xlabel(f"two axes, which show {drawn.share:.0%} of what tells the centres apart")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.legend(loc="best")
    axis.set_title("centres in blue, prototypes in grey, a prompt as a cross")
    return figure


def _free_side(point: Floats, prototypes: Floats, points: Floats) -> dict[str, Any]:
    """Where a name is written: on the side without prototypes, or above where another point is."""
    left = bool(prototypes[:, 0].mean() > point[0])
    reach = np.ptp(points, axis=0) * (0.12, 0.04)
    away = (points - point) * (-1 if left else 1, 1)
    if ((np.abs(away) < reach).all(1) & (away[:, 0] > 0)).any():
        return {"xytext": (0, 8), "ha": "center"}
    return {"xytext": (-8, -3), "ha": "right"} if left else {"xytext": (8, -3), "ha": "left"}


def scores(scorer: RouterScorer, prompts: Sequence[str]) -> Any:
    """The best candidates of each prompt, those that run in colour."""
    figure, axes = panels(10.5, 3.0, len(prompts), sharex=True)
    for axis, prompt in zip(axes, prompts, strict=True):
        choice = scorer.route(prompt)
        rows = choice.candidates[:SHOWN]
        for i, row in enumerate(rows):
            runs = row.adapter in choice.adapters
            axis.barh(i, max(row.score, 0), color=COLOURS[OURS] if runs else PALE)
            axis.text(1.02, i, f"p {row.probability:.2f}", va="center", color=INK, size=9)
        axis.set_yticks(range(len(rows)), [row.adapter for row in rows])
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.set_xlabel("score")
        runs_by = " and ".join(choice.adapters) or "the base: the router abstains"
        axis.set_title(f"{prompt}\n{runs_by}", size=9.5)
    return figure


def calibrated(scorer: RouterScorer) -> Any:
    """Probabilities against what is right, on prompts of the adapters and of nobody."""
    suite = demo_suite()
    parts = (suite.trained_templates, [*suite.kept_templates, *suite.reworded], suite.near)
    found = calibration([(scorer(texts(cases)), cases) for cases in parts])
    if found is None:
        raise TypeError("a router has probabilities")
    return reliability({OURS: found})


def main(argv: Sequence[str] | None = None) -> int:
    """Draw all three into a directory."""
    arguments = sys.argv[1:] if argv is None else argv
    directory = Path(arguments[0]) if arguments else DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    scorer = LoadedBundle(bundle_path()).scorer
    pictures: dict[str, Callable[[], Any]] = {
        "map": lambda: keys(scorer, PROMPTS[0]),
        "scores": lambda: scores(scorer, PROMPTS),
        "calibration": lambda: calibrated(scorer),
    }
    with drawing():
        for name, picture in pictures.items():
            # Without the version of what drew it, the same figure gives the same file.
            picture().savefig(directory / f"{name}.png", dpi=110, metadata={"Software": None})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
