"""What adapters in int8 slots cost in quality: prompts answered with them and without.

Every adapter of the demo answers fresh prompts (no fitting used their seed) from slots in float32
and from slots in int8, alone and in the pairs that the demo knows, by torch. Compared are the
logits where both have read the same tokens, the greedy tokens there, and how many answers are
right. So is a hard case: random adapters, their deltas 0.6 of the weights' norms, on a random base
whose logits are close together everywhere. Then Triton's kernels, interpreted on the CPU where
there is no card, answer a few of the prompts from int8 slots, beside torch from the same.

    python -m benchmarks.int8_adapters --json
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import exactness, families, oracle, report
from benchmarks.exactness import Capture
from benchmarks.local import LocalEngine
from mora_serve.config import AdaptersConfig, BaseConfig, Config, EngineConfig
from mora_serve.core import SamplingParams
from mora_serve.demo.bundle import MANIFEST_FILE, bundle_path
from router_training.demo.suite import demo_suite

LONGEST = 40  # tokens of an answer
FEW = 4  # tokens of one by kernels
PROMPT = 40  # random ids


@dataclass(frozen=True)
class Prompts:
    """A base, adapters by name as directories under ``root``, and what is asked of them.

    ``asked`` are prompts, as texts of a user or ids, with their mixtures; ``wanted`` the right
    answers, where there are any.
    """

    base: Path
    root: Path
    adapters: Mapping[str, str]
    asked: Sequence[tuple[str | list[int], Mapping[str, float]]]
    wanted: Sequence[str] = ()


@dataclass(frozen=True)
class Answers:
    """Token ids of each answer, the logits [tokens, vocabulary] they are from, and its text."""

    ids: Sequence[Sequence[int]]
    logits: Sequence[Tensor]
    texts: Sequence[str]
    slot_bytes: int

    def read_alike(self, other: Answers, i: int) -> int:
        """How many tokens of answer ``i``, its end among them, followed the same in both."""
        same = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(self.ids[i], other.ids[i], strict=False)
        )
        return min(len(list(same)) + 1, len(self.logits[i]), len(other.logits[i]))

    def error(self, other: Answers, i: int) -> float:
        """The other's error in the logits of answer ``i``, relative to these, as far as alike."""
        n = self.read_alike(other, i)
        want, got = self.logits[i][:n], other.logits[i][:n]
        return float((got - want).norm() / want.norm())


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--prompts", type=int, default=8, help="a task and pair of the demo")
    parser.add_argument("--by-kernels", type=int, default=2, help="prompts that kernels answer")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports triton
    prompts = demo(args.prompts)
    result: dict[str, Any] = {"demo": measure(prompts)}
    with tempfile.TemporaryDirectory() as folder:
        result["random"] = measure(hard(Path(folder)))
    result["kernels"] = by_kernels(prompts, args.by_kernels)
    report.emit({**result, "environment": report.environment()})


def demo(count: int) -> Prompts:
    """Fresh prompts for each of the bundle's adapters, and for pairs of them."""
    suite, bundle = demo_suite(prompts=count), bundle_path()
    manifest: Mapping[str, Any] = json.loads((bundle / MANIFEST_FILE).read_text())
    cases = [*suite.kept_templates, *suite.pairs_kept.both()]
    return Prompts(
        bundle / "base",
        bundle,
        {entry["name"]: entry["directory"] for entry in manifest["adapters"]},
        [(case.prompt, dict.fromkeys(case.adapters, 1.0)) for case in cases],
        [case.answer for case in cases],
    )


def hard(folder: Path) -> Prompts:
    """A random base, PEFT's adapters of every kind on it, and the mixtures of exactness.py."""
    model = families.make_base("llama3", folder / "base")
    oracle.make_adapters(copy.deepcopy(model), folder / "adapters")
    generator = torch.Generator().manual_seed(1)
    mixtures = [mixture for mixture in exactness.MIXTURES.values() if mixture]
    ids = torch.randint(4, 320, (len(mixtures), PROMPT), generator=generator).tolist()
    names = {name: name for name in oracle.VARIANTS}
    asked = list(zip(ids, mixtures, strict=True))
    return Prompts(folder / "base", folder / "adapters", names, asked)


def measure(prompts: Prompts) -> dict[str, Any]:
    """Int8 beside float32: errors of the logits, tokens that differ, answers that are right."""
    exact, rounded = (answers(prompts, form, "torch", LONGEST) for form in ("auto", "int8"))
    count = range(len(prompts.asked))
    errors = [exact.error(rounded, i) for i in count]
    changed = [list(exact.ids[i]) != list(rounded.ids[i]) for i in count]
    result: dict[str, Any] = {
        "prompts": len(count),
        "tokens": sum(exact.read_alike(rounded, i) for i in count),
        "logits_error_mean": statistics.mean(errors),
        "logits_error_worst": max(errors),
        "tokens_changed": sum(changed),
        "slot_bytes_over_bf16": 2 * rounded.slot_bytes / exact.slot_bytes,
    }
    if prompts.wanted:
        for name, of in (("exact", exact), ("int8", rounded)):
            right = sum(t == w for t, w in zip(of.texts, prompts.wanted, strict=True))
            result[f"right_{name}"] = right / len(count)
        result["right_lost"] = result["right_exact"] - result["right_int8"]
    report.log(str(result))
    return result


def by_kernels(prompts: Prompts, count: int) -> dict[str, Any]:
    """Triton's kernels beside torch, both from int8 slots: the same but for the order of sums."""
    every = max(1, len(prompts.asked) // count)
    few = replace(prompts, asked=prompts.asked[::every][:count])
    torch_s, kernels = (answers(few, "int8", name, FEW) for name in ("torch", "triton"))
    return {
        "interpreted": not torch.cuda.is_available(),
        "prompts": len(few.asked),
        "logits_error": max(torch_s.error(kernels, i) for i in range(len(few.asked))),
        "tokens_changed": sum(a != b for a, b in zip(torch_s.ids, kernels.ids, strict=True)),
    }


def answers(prompts: Prompts, form: Any, kernels: Any, most: int) -> Answers:
    """Greedy answers of up to ``most`` tokens, in float32 but for the slots."""
    config = Config(
        BaseConfig(str(prompts.base), quantization="auto", dtype="fp32"),
        EngineConfig(kernels=kernels, prefix_cache=False),
        AdaptersConfig(slots=len(prompts.adapters), dtype=form),
    )
    with LocalEngine(config) as engine:
        for name, directory in prompts.adapters.items():
            engine.register(name, prompts.root, directory)
        capture, tokenizer = Capture(engine), engine.base.tokenizer
        jobs = [
            (
                tokenizer.chat([("user", prompt)]) if isinstance(prompt, str) else prompt,
                mixture,
                SamplingParams(most, ignore_eos=not isinstance(prompt, str)),
            )
            for prompt, mixture in prompts.asked
        ]
        ids = engine.generate(jobs)
        logits = [torch.stack(capture.logits[f"r{i}"]).cpu() for i in range(1, len(jobs) + 1)]
        texts = [tokenizer.decode(answer) for answer in ids]
        return Answers(ids, logits, texts, engine.engine.pool.slots.nbytes)


if __name__ == "__main__":
    main()
