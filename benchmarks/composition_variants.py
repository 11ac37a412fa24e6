"""What makes adapters compose? Variants of their training, each with the same steps and rows.

All on the bundle's base and the demo's tasks: without pairs, other weights, ranks, projections and
layers, one part of the layers for operations and the other for styles, an adapter of all rows
beside them, operations and styles held orthogonal, other seeds. ``--base-hidden`` makes a base of
another width first, by the recipe of the bundle's.

    OMP_NUM_THREADS=2 python -m benchmarks.composition_variants --json
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import report
from mora_serve.config import BaseConfig
from mora_serve.demo.bundle import bundle_path
from mora_serve.model.loading import load_base
from mora_serve.model.shape import PROJECTIONS
from mora_serve.model.stacked import StackedAdapters
from router_training.batched import AdapterRecipe, train_adapters
from router_training.demo.adapters import MixingRecipe, mixed_rows
from router_training.demo.base import BaseRecipe, pretrain
from router_training.demo.composition import COLUMNS, Composition
from router_training.demo.nf4 import save_nf4
from router_training.demo.tasks import OPERATIONS, STYLES, TASKS

NAMES = tuple(TASKS)
SEED = 2_000_000  # of the prompts: not those of the figures that are stated


@dataclass(frozen=True)
class Variant:
    """One way to train; layers are those that operations' and styles' adapters may change."""

    mixing: MixingRecipe = field(default_factory=MixingRecipe)
    rank: int = 8
    targets: tuple[str, ...] = PROJECTIONS
    operation_layers: tuple[int, ...] = (0, 1, 2, 3)
    style_layers: tuple[int, ...] = (0, 1, 2, 3)
    shared: bool = False
    orthogonality: float = 0.0
    seed: int = 1


VARIANTS: Mapping[str, Variant] = {
    "as shipped": Variant(),
    "another seed": Variant(seed=2),
    "no pairs": Variant(MixingRecipe(pairs=0.0)),
    "no wrong adapters beside": Variant(MixingRecipe(wrong=0.0)),
    "weights ± 20 %": Variant(MixingRecipe(jitter=0.2)),
    "rank 2": Variant(rank=2),
    "rank 4": Variant(rank=4),
    "rank 16": Variant(rank=16),
    "attention only": Variant(targets=("q_proj", "k_proj", "v_proj", "o_proj")),
    "MLP only": Variant(targets=("gate_proj", "up_proj", "down_proj")),
    "layers 0-1 only": Variant(operation_layers=(0, 1), style_layers=(0, 1)),
    "operations in 0-1, styles in 2-3": Variant(operation_layers=(0, 1), style_layers=(2, 3)),
    "styles in 0-1, operations in 2-3": Variant(operation_layers=(2, 3), style_layers=(0, 1)),
    "a shared adapter in every row": Variant(shared=True),
    "orthogonality 0.1": Variant(orthogonality=0.1),
}


def main() -> None:
    """Train and measure each variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--base", type=Path, default=bundle_path() / "base")
    parser.add_argument("--base-hidden", type=int, help="width; the base is kept in --base")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=24, help="prompts a cell")
    parser.add_argument("--only", nargs="*", choices=sorted(VARIANTS), default=sorted(VARIANTS))
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    if args.base_hidden is not None and not (args.base / "config.json").exists():
        save_nf4(pretrain(BaseRecipe(hidden=args.base_hidden), report.log), args.base)
    base = load_base(BaseConfig(str(args.base), dtype="fp32", device="cpu"))
    rows: dict[str, dict[str, Any]] = {}
    for name, variant in VARIANTS.items():
        if name not in args.only:
            continue
        started = time.monotonic()
        always = ((len(NAMES), 1.0),) if variant.shared else ()
        adapters = train_adapters(
            base.decoder,
            len(NAMES) + len(always),
            mixed_rows(variant.mixing, variant.seed, always),
            AdapterRecipe(
                rank=variant.rank,
                alpha=2.0 * variant.rank,
                targets=variant.targets,
                steps=args.steps,
                seed=variant.seed,
            ),
            report.log,
            confine(variant.operation_layers, variant.style_layers),
            orthogonality(variant.orthogonality) if variant.orthogonality else None,
        )
        found = Composition(base.decoder, adapters, SEED, args.prompts, always).measure()
        rows[name] = {c: found[c] for c in COLUMNS}
        rows[name] |= {"least_pair": found["least_pair"], "seconds": time.monotonic() - started}
        report.log(f"{name:34} " + "  ".join(f"{c} {found[c]:.3f}" for c in COLUMNS))
    report.log("| variant | " + " | ".join(COLUMNS) + " |")
    for name, row in rows.items():
        report.log(f"| {name} | " + " | ".join(f"{row[c]:.3f}" for c in COLUMNS) + " |")
    report.emit(
        {
            "rows": rows,
            "arguments": {k: str(v) for k, v in vars(args).items()},
            "environment": report.environment(),
        }
    )


def confine(operation: Sequence[int], style: Sequence[int]) -> Callable[[StackedAdapters], None]:
    """Keep the adapters out of all other layers: there B stays zero."""

    allowed = dict.fromkeys(OPERATIONS, operation) | dict.fromkeys(STYLES, style)

    def prepare(adapters: StackedAdapters) -> None:
        for key, b in adapters.b.items():
            layer, _, index = key.split("/")
            name = NAMES[int(index)] if int(index) < len(NAMES) else None
            if name and int(layer) not in allowed[name]:
                b.register_hook(torch.zeros_like)

    return prepare


def orthogonality(weight: float) -> Callable[[StackedAdapters], Tensor]:
    """The mean squared cosine of what operations and styles write into the residual stream."""
    operations = [NAMES.index(name) for name in OPERATIONS]
    styles = [NAMES.index(name) for name in STYLES]

    def penalty(adapters: StackedAdapters) -> Tensor:
        terms = []
        for layer, name in itertools.product(range(adapters.shape.layers), ("o_proj", "down_proj")):
            one, other = (
                torch.cat([_unit(adapters.projection(layer, name, i)[1]) for i in indices])
                for indices in (operations, styles)
            )
            terms.append((one @ other.T).square().mean())
        return weight * torch.stack(terms).mean()

    return penalty


def _unit(b: Tensor) -> Tensor:
    return F.normalize(b, dim=-1, eps=1e-4)  # [rank, out]; zeros at the start


if __name__ == "__main__":
    main()
