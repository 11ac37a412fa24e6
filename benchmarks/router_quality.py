"""How well the router does on the demo's world, and how well it takes in what it has not seen.

The bundle's router, with all adapters registered by their cards, is asked prompts from seeds that
no fitting uses: known tasks, pairs, new wordings, prompts of nobody. For adapters that are
registered later it is fitted again with parts of them left out, so that each is new to one
router; all are registered then, those left out by 16 prompts or fewer.

    OMP_NUM_THREADS=1 python -m benchmarks.router_quality --json
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from mora_serve.adapters import card
from mora_serve.config import AdaptersConfig
from mora_serve.demo.bundle import bundle_path
from mora_serve.router.router import Router
from router_training.demo.evaluate import FRESH_SEED
from router_training.demo.loaded import ROUTER_FILE
from router_training.demo.manifest import Manifest
from router_training.demo.measure import (
    Answered,
    Asked,
    Judged,
    Registered,
    answers,
    error,
    figures,
    judged,
    questions,
)
from router_training.demo.routing import RouterRecipe, demo_data
from router_training.demo.tasks import OPERATIONS, STYLES
from router_training.router import fit_router

COUNTS = (16, 8, 4, 1)  # prompts that a late adapter comes with
Cards = dict[str, tuple[str, ...]]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--bundle", type=Path, default=bundle_path())
    parser.add_argument("--prompts", type=int, default=32, help="a task and wording")
    parser.add_argument("--seed", type=int, default=FRESH_SEED, help="of the prompts")
    parser.add_argument("--folds", type=int, default=5, help="parts of the adapters left out")
    args = parser.parse_args()
    started = time.monotonic()
    cards = read_cards(args.bundle)
    asked = questions(tuple(cards), args.seed, args.prompts)
    router = Router.load(
        (args.bundle / Manifest.read(args.bundle).router / ROUTER_FILE).read_bytes()
    )
    found = answers(Registered.of(router, cards), asked)
    bundled = figures(found)
    for name, value in bundled.items():
        report.log(f"{name:30} {value:.4f}")
    later = cross_fitted(cards, asked, router, args.folds)
    report.emit(
        {
            **bundled,
            "later": later,
            "prompts": len(asked),
            "arguments": {**vars(args), "bundle": args.bundle.name},
            "seconds": round(time.monotonic() - started, 1),
            "environment": report.environment(),
        }
    )


def read_cards(bundle: Path) -> Cards:
    """The example prompts of a bundle's adapters."""
    return {
        a.name: card.parse_card(
            (bundle / a.directory / card.FILE).read_bytes(), AdaptersConfig()
        ).prompts
        for a in Manifest.read(bundle).adapters
    }


def parts(folds: int) -> list[tuple[str, ...]]:
    """The adapters in parts of about one size; no part has two styles."""
    order = [*STYLES, *OPERATIONS]
    return [tuple(order[i::folds]) for i in range(folds)]


def cross_fitted(
    cards: Cards, asked: Sequence[Asked], bundled: Router, folds: int
) -> dict[str, Any]:
    """Figures of adapters that are new to the router, over all adapters.

    λ and the blend are the bundled router's: chosen without its own late adapters only.
    """
    recipe = RouterRecipe()
    chosen = dataclasses.replace(
        recipe.options,
        strengths=(bundled.content.report["strength"],),
        blends=(bundled.calibration.blend,),
    )
    every: list[Answered] = []
    top: list[Judged] = []
    candidates: list[Judged] = []
    by_count: dict[int, list[bool]] = {n: [] for n in COUNTS}
    for part in parts(folds):
        known = [name for name in cards if name not in part]
        data, _ = fit_router(demo_data(recipe, known), options=chosen)
        router = Router.load(data)
        for count in COUNTS:
            own = {n: p[:count] if n in part else p for n, p in cards.items()}
            # Only what asks for a new adapter; with whole cards, everything else as well.
            some = [q for q in asked if count == COUNTS[0] or concerns(q, part)]
            found = answers(Registered.of(router, own), some)
            mine = [a for a in found if concerns(a.asked, part)]
            by_count[count] += [a.top for a in mine if len(a.asked.right) == 1 and kept(a)]
            if count == COUNTS[0]:
                every += mine
                best, above = judged(found, known)
                top += best
                candidates += above
        report.log(f"without {', '.join(part)}: {np.mean(by_count[COUNTS[0]]):.4f} so far")
    named = figures(every, known=())
    return {
        **{k.removeprefix("held_out_"): v for k, v in named.items() if k.startswith("held_out")},
        **{k: named[k] for k in named if k.startswith(("pairs", "reworded", "new_words"))},
        "by_prompts": {str(n): round(float(np.mean(v)), 4) for n, v in by_count.items()},
        "calibration_error": round(error(top), 4),
        "calibration_error_all": round(error(candidates), 4),
    }


def concerns(asked: Asked, part: Sequence[str]) -> bool:
    """Whether an adapter of the part is right for a prompt."""
    return bool(asked.right.intersection(part))


def kept(answer: Answered) -> bool:
    """Whether a prompt is in a wording kept for testing, of known words."""
    return answer.asked.wording == "kept" and answer.asked.known


if __name__ == "__main__":
    main()
