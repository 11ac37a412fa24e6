"""How adapters compose that were trained alone and in pairs, on pairs that no training has joined.

For each of two bases, three sets of the demo's adapters from three seeds: the bundle's base, which
has seen every pair in coded form, and one trained here in the same way, which has never seen the
held-out pairs at all. Measured on fresh prompts; see ``router_training.demo.composition``.

    OMP_NUM_THREADS=2 python -m benchmarks.composition --json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from mora_serve.config import BaseConfig
from mora_serve.demo.bundle import bundle_path
from mora_serve.model.loading import load_base
from router_training.batched import AdapterRecipe
from router_training.demo.adapters import MixingRecipe, train_demo_adapters
from router_training.demo.base import BaseRecipe, pretrain
from router_training.demo.composition import Composition
from router_training.demo.evaluate import FRESH_SEED
from router_training.demo.nf4 import save_nf4
from router_training.demo.pairs import HELD_OUT_PAIRS


def main() -> None:
    """Train, measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="of the adapters")
    parser.add_argument("--prompts", type=int, default=32, help="prompts a cell")
    parser.add_argument("--steps", type=int, default=AdapterRecipe.steps)
    parser.add_argument("--base-steps", type=int, default=BaseRecipe.steps)
    parser.add_argument("--unseen-base", type=Path, help="one made before, kept here")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    recipe = AdapterRecipe(steps=args.steps)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        unseen = args.unseen_base or Path(temporary) / "base"
        if not (unseen / "config.json").exists():
            base_recipe = BaseRecipe(steps=args.base_steps, excluded=HELD_OUT_PAIRS)
            save_nf4(pretrain(base_recipe, report.log), unseen)
        found = {
            name: over_seeds(directory, recipe, args.seeds, args.prompts)
            for name, directory in (("coded", bundle_path() / "base"), ("unseen", unseen))
        }
    report.emit(
        {
            **found,
            "seconds": time.monotonic() - started,
            "mixing": vars(MixingRecipe()),
            "arguments": {k: str(v) for k, v in vars(args).items()},
            "environment": report.environment(),
        }
    )


def over_seeds(
    directory: Path, recipe: AdapterRecipe, seeds: Sequence[int], prompts: int
) -> dict[str, Any]:
    """Figures of each seed's adapters on one base, their means, and each pair's mean."""
    base = load_base(BaseConfig(str(directory), dtype="fp32", device="cpu"))
    rows = []
    for seed in seeds:
        adapters = train_demo_adapters(base.decoder, replace(recipe, seed=seed), log=report.log)
        row = Composition(base.decoder, adapters, FRESH_SEED, prompts).measure()
        numbers = {k: v for k, v in row.items() if isinstance(v, float)}
        report.log(f"seed {seed}: " + ", ".join(f"{k} {v:.3f}" for k, v in numbers.items()))
        rows.append(row)
    means = {
        name: statistics.mean(row[name] for row in rows)
        for name, value in rows[0].items()
        if isinstance(value, float)
    }
    held_out = {
        pair: statistics.mean(row["pairs_held_out"][pair] for row in rows)
        for pair in rows[0]["pairs_held_out"]
    }
    least = min(held_out, key=lambda pair: held_out[pair])
    return {
        "mean": means,
        "held_out_pairs": held_out,
        "least_held_out_pair": {"pair": least, "exact_match": held_out[least]},
        "seeds": dict(zip(map(str, seeds), rows, strict=True)),
    }


if __name__ == "__main__":
    main()
