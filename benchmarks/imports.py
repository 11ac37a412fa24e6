"""Adapters of other trainers: directories as they write them, served, with PEFT's logits.

Unsloth, Axolotl and LLaMA-Factory are repeated from their sources around PEFT's own saving, TRL is
run (other_trainers.py). Each directory is checked and registered as it is; the server's decoder
then has to give the logits that PEFT gives for the same model, in float32.

    python -m benchmarks.imports --json
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks import families, other_trainers, report
from benchmarks.local import LocalEngine
from mora_serve.adapters.check import Report, check_directory
from mora_serve.config import AdaptersConfig, BaseConfig, Config, EngineConfig
from mora_serve.model.attention import DenseCausal
from mora_serve.model.lora import PooledAdapters, plan_mixtures

IDS = torch.tensor([5, 40, 7, 99, 230, 17, 8, 64])


class Imports:
    """A small base in ``root``, trainers' directories beside it, and the server's logits.

    A context that stops its engine.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base_directory = root / "base"
        self.model = families.make_base("llama3", self.base_directory)
        base = BaseConfig(str(self.base_directory), quantization="none", dtype="fp32", device="cpu")
        self.engine = LocalEngine(Config(base, EngineConfig(kernels="torch"), AdaptersConfig()))
        self._made: dict[str, Any] = {}

    def __enter__(self) -> Imports:
        return self

    def __exit__(self, *error: object) -> None:
        self.engine.engine.stop()

    def made(self, name: str) -> tuple[Path, Any]:
        """A trainer's directory and its PEFT model, made once."""
        if name not in self._made:
            make = other_trainers.TRAINERS[name]
            self._made[name] = make(self.model, self.base_directory, self.root / name)
        return self.root / name, self._made[name]

    def check(self, path: Path) -> Report:
        """What ``mora-serve adapters check`` says of a directory."""
        return check_directory(path, AdaptersConfig(), self.engine.base.shape)

    @torch.inference_mode()
    def logits(self, path: Path) -> torch.Tensor:
        """Register a directory below the root and run IDS through its adapter: [T, vocabulary]."""
        name = str(path.relative_to(self.root))
        self.engine.register(name, self.root, name)
        self.engine.make_resident([name])
        pool, decoder = self.engine.engine.pool, self.engine.base.decoder
        mixture = ((pool.slot(self.engine.digests[name]), 1.0),)
        plan = plan_mixtures(pool.slots, [mixture], [len(IDS)])
        assert plan is not None
        hidden = decoder.hidden(
            IDS, torch.arange(len(IDS)), DenseCausal(1, len(IDS)), PooledAdapters(pool.slots, plan)
        )
        return decoder.logits(hidden)


@torch.inference_mode()
def peft_logits(model: Any) -> torch.Tensor:
    """PEFT's logits of IDS, [T, vocabulary]."""
    logits: torch.Tensor = model(input_ids=IDS[None]).logits[0]
    return logits


def main() -> None:
    """Make, register, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.parse_args()
    logging.disable(logging.WARNING)  # the trainers' own
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, Imports(Path(folder)) as imports:
        found = {name: measure(imports, name) for name in other_trainers.TRAINERS}
    report.emit(
        {
            "trainers": found,
            "served": sum(f["refusal"] is None for f in found.values()),
            "largest_difference": max(f["difference"] for f in found.values()),
            "environment": report.environment(),
        }
    )


def measure(imports: Imports, name: str) -> dict[str, Any]:
    """What is said of one directory, and how far its logits are from PEFT's."""
    path, model = imports.made(name)
    refusal = imports.check(path).refusal
    if refusal is not None:
        return {"refusal": refusal["message"], "difference": float("1e9")}
    difference = (imports.logits(path) - peft_logits(model)).abs().max()
    return {"refusal": None, "difference": float(difference)}


if __name__ == "__main__":
    main()
