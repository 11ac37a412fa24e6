"""The work that ours and the peers are measured on: a base, adapters, prompts, and what a run took.

By default a Llama of 100M parameters in NF4, prompts of 32 and answers of 256 tokens, adapters of
rank 16 on all seven projections. Prompts are new in every repetition.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks import memory
from benchmarks.open_loop import percentiles
from benchmarks.oracle import PROJECTIONS
from mora_serve.model.shape import projection_path, shape_from_config

Mixtures = Sequence[dict[str, float]]


@dataclass(frozen=True)
class Workload:
    """Sizes of the base, its prompts and answers in tokens, and the adapters' rank."""

    hidden: int = 1024
    intermediate: int = 2816
    layers: int = 12
    vocabulary: int = 32000
    prompt: int = 32
    tokens: int = 256
    rank: int = 16

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """A flag for each field."""
        for f in fields(cls):
            parser.add_argument(f"--{f.name}", type=int, default=f.default)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Workload:
        """The workload of parsed flags."""
        return cls(**{f.name: getattr(args, f.name) for f in fields(cls)})

    def write_base(self, directory: Path) -> None:
        """Write the random 16-bit base."""
        directory.mkdir(parents=True)
        sizes = (self.hidden, self.intermediate, self.layers, self.vocabulary)
        memory.write_model(directory, memory.llama_config(*sizes))

    def write_adapters(self, directory: Path, count: int, prefix: str = "a") -> list[str]:
        """Write random adapters as PEFT saves them, in bf16; their names, also their folders."""
        from peft import LoraConfig

        sizes = (self.hidden, self.intermediate, self.layers, self.vocabulary)
        shape = shape_from_config(memory.llama_config(*sizes))
        names = [f"{prefix}{i}" for i in range(count)]
        for i, name in enumerate(names):
            rng = torch.Generator().manual_seed(i)
            tensors = {}
            for layer, projection in itertools.product(range(self.layers), PROJECTIONS):
                rows, columns = shape.projection(projection)
                key = f"base_model.model.{projection_path(layer, projection)}"
                a = torch.randn(self.rank, columns, generator=rng) * columns**-0.5
                b = torch.randn(rows, self.rank, generator=rng) * 0.01
                tensors[f"{key}.lora_A.weight"] = a.bfloat16()
                tensors[f"{key}.lora_B.weight"] = b.bfloat16()
            config = LoraConfig(
                r=self.rank,
                lora_alpha=2 * self.rank,
                target_modules=list(PROJECTIONS),
                task_type="CAUSAL_LM",
            )
            config.save_pretrained(str(directory / name))
            save_file(tensors, directory / name / "adapter_model.safetensors")
        return names

    def prompts(self, count: int, turn: int) -> list[list[int]]:
        """The token ids of one repetition's prompts."""
        rng = random.Random(f"{self.prompt} {turn}")
        return [
            [rng.randrange(4, self.vocabulary) for _ in range(self.prompt)] for _ in range(count)
        ]


def mixtures(requests: int, active: int, size: int) -> list[dict[str, float]]:
    """Request i's mixture: ``size`` adapters of ``active``, beginning with the i-th, weights 1."""
    return [{f"a{(i + k) % active}": 1.0 for k in range(size)} for i in range(requests)]


@dataclass(frozen=True)
class Run:
    """One batch of requests: each one's token ids, and when each token came, in seconds."""

    tokens: Sequence[Sequence[int]]
    times: Sequence[Sequence[float]]

    def rate(self, tokens: int | None = None) -> float:
        """Tokens a second until all requests had ``tokens`` tokens; all that they have if None."""
        count = len(self.times[0]) if tokens is None else tokens
        return len(self.times) * count / max(times[count - 1] for times in self.times)

    def until(self, tokens: int) -> Run:
        """This run as far as each request's first ``tokens`` tokens."""
        return Run([ids[:tokens] for ids in self.tokens], [t[:tokens] for t in self.times])

    @property
    def first_token(self) -> list[float]:
        """Seconds to each request's first token."""
        return [times[0] for times in self.times]

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens; those that came in one message count once."""
        return [b - a for times in self.times for a, b in itertools.pairwise(times) if b > a]

    def check(self, tokens: int) -> Run:
        """This run, if every request got ``tokens`` tokens. Raises RuntimeError otherwise."""
        counts = [len(t) for t in self.tokens]
        if any(n != tokens for n in counts):
            raise RuntimeError(f"answers have {counts} tokens, not {tokens}")
        return self


def latencies(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """First-token and inter-token percentiles of some runs, in milliseconds."""
    return {
        "first_token_ms": percentiles([t for run in runs for t in run.first_token]),
        "inter_token_ms": percentiles([t for run in runs for t in run.gaps]),
    }
