"""One base over several ranks of this machine against one rank alone: logits and tokens.

Small random bases of every family that can be cut so, unquantised and NF4, in fp32; one batch holds
mixtures of every kind of adapter. The logits are those of every sampled position, from the real
scheduler, runner and paged attention. On a CPU the ranks are processes that talk by gloo, on cards
(``--device cuda``) each has one of its own and they talk by nccl.

    python -m benchmarks.tensor_parallel --json
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import families, oracle, report
from benchmarks.exactness import MIXTURES, Capture
from benchmarks.local import LocalEngine
from mora_serve.config import AdaptersConfig, BaseConfig, Config, EngineConfig
from mora_serve.core import SamplingParams
from mora_serve.errors import ConfigError

PROMPT = 48
UNCUT = "of NF4's blocks"


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--families", nargs="*", default=sorted(families.FAMILIES))
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for family in args.families:
            root = Path(folder) / family
            model = families.make_base(family, root / "base")
            oracle.make_adapters(copy.deepcopy(model), root / "adapters")
            for quantization in ("none", "nf4"):
                row = {"family": family, "quantization": quantization}
                row |= compare(root, quantization, args.ranks, args.device, args.tokens)
                report.log(str(row))
                rows.append(row)
    compared = [row for row in rows if "error" in row]
    report.emit(
        {
            "ranks": args.ranks,
            "device": args.device,
            "cases": len(MIXTURES),
            "rows": rows,
            "compared": len(compared),
            "max_error": max(row["error"] for row in compared),
            "tokens_different": sum(row["different"] for row in compared),
            "environment": report.environment(),
        }
    )


def compare(root: Path, quantization: Any, ranks: int, device: str, tokens: int) -> dict[str, Any]:
    """One base: the largest relative difference of a case's logits, and of how many its tokens."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(4, 320, (len(MIXTURES), PROMPT), generator=generator).tolist()
    want, reference, alone = run(root, quantization, 1, device, prompts, tokens)
    try:
        got, logits, together = run(root, quantization, ranks, device, prompts, tokens)
    except ConfigError as e:
        if UNCUT not in e.message:
            raise
        return {"refused": e.message}
    errors = [
        float((a - b).norm() / b.norm())
        for a, b, x, y in zip(logits, reference, got, want, strict=True)
        if x == y  # after another token they are of another text
    ]
    return {
        "error": max(errors),
        "different": sum(a != b for a, b in zip(got, want, strict=True)),
        "seconds_alone": round(alone, 2),
        "seconds_together": round(together, 2),
    }


def run(
    root: Path, quantization: Any, ranks: int, device: str, prompts: list[list[int]], tokens: int
) -> tuple[list[list[int]], list[Tensor], float]:
    """Tokens, logits [tokens, vocabulary] and seconds of all cases in one batch."""
    kernels: Any = "torch" if device == "cpu" else "auto"
    config = Config(
        BaseConfig(str(root / "base"), "main", quantization, "fp32", device),
        EngineConfig(max_batch=64, page_size=8, kernels=kernels, tensor_parallel=ranks),
        AdaptersConfig(slots=len(oracle.VARIANTS) + 4, max_rank=64),
    )
    with LocalEngine(config) as engine:
        for name in oracle.VARIANTS:
            engine.register(name, root / "adapters", name)
        engine.make_resident(list(oracle.VARIANTS))
        capture = Capture(engine)
        jobs = [
            (prompt, mixture, SamplingParams(tokens, ignore_eos=True))
            for prompt, mixture in zip(prompts, MIXTURES.values(), strict=True)
        ]
        start = time.monotonic()
        answers = engine.generate(jobs)
        seconds = time.monotonic() - start
    logits = [torch.stack(capture.logits[f"r{i + 1}"]).cpu() for i in range(len(jobs))]
    return answers, logits, seconds


if __name__ == "__main__":
    main()
