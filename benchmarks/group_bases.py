"""Bases in GPTQ and AWQ against transformers and PEFT on the same weights.

Checkpoints of small models are made here in the formats' layouts (see ``group_checkpoints``), in
every variant that the server takes: symmetric and with zeros, act-order, groups of 32, 64, 128 and
the whole row, scales folded into norms, the head quantised too. For each, the weights are read back
by the formats' definitions and put into transformers' own model: logits are compared with it, and
greedy tokens through the engine with PEFT's adapters on it. Where two logits are nearly equal,
either token is right.

    python -m benchmarks.group_bases --json [--device cuda] [--dtype bf16]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import families, group_checkpoints, oracle, report
from benchmarks.group_checkpoints import Recipe
from benchmarks.local import LocalEngine
from mora_serve.config import AdaptersConfig, BaseConfig, Config, EngineConfig
from mora_serve.core import SamplingParams
from mora_serve.model.attention import DenseCausal

RECIPES: Mapping[str, tuple[str, Recipe]] = {
    "gptq": ("llama3", Recipe()),
    "gptq-zeros": ("qwen2", Recipe(symmetric=False, v2=True, group=32)),
    "gptq-act-order": ("qwen3", Recipe(symmetric=False, act_order=True, head=True)),
    "gptq-short-group": ("mistral", Recipe(group=128, act_order=True)),
    "gptq-one-group": ("llama2", Recipe(group=-1)),
    "gptq-8-bits": ("llama2", Recipe(bits=8, symmetric=False)),
    "awq": ("llama3", Recipe("awq")),
    "awq-folded": ("qwen2", Recipe("awq", group=32, fold=True, head=True)),
    "awq-short-group": ("mistral", Recipe("awq", group=128)),
}
ADAPTERS = ("rank-8", "rank-64", "dora")
MIXTURES: Sequence[Mapping[str, float]] = (
    {},
    {"rank-8": 1.0},
    {"rank-64": 0.5, "rank-8": -0.6},
    {"dora": 1.0},
)
PROMPT = 40
NEAR = 1e-3  # of the largest logit: tokens closer than this may change places


def main() -> None:
    """Measure every variant and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    parser.add_argument("--only", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    args = parser.parse_args()
    rows = []
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(Path(folder), name, args.device, args.dtype, args.tokens))
        report.log(str(rows[-1]))
    report.emit({**summary(rows), "rows": rows, "environment": report.environment()})


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The largest errors of each method, and the tokens that are wrong in all."""
    out: dict[str, Any] = {"wrong_tokens": sum(r["wrong_tokens"] for r in rows)}
    for method in ("gptq", "awq"):
        own = [r for r in rows if r["quantization"].startswith(method)]
        if own:
            out[f"{method}_logits"] = max(r["logits"] for r in own)
    return out


def measure(folder: Path, name: str, device: str, dtype: Any, tokens: int) -> dict[str, Any]:
    """One variant: ``logits`` is the largest relative error of a mixture's logits."""
    family, recipe = RECIPES[name]
    families.make_base(family, folder / "plain")
    directory = group_checkpoints.write(folder / "plain", folder / "base", recipe)
    model = group_checkpoints.oracle(
        directory, lambda: families.make_base(family, folder / "again")
    )
    variants = {n: oracle.VARIANTS[n] for n in ADAPTERS}
    peft = oracle.make_adapters(model, folder / "adapters", variants)
    config = Config(
        BaseConfig(str(directory), dtype=dtype, device=device),
        EngineConfig(max_batch=len(MIXTURES)),
        AdaptersConfig(slots=8),
    )
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 320, (len(MIXTURES), PROMPT), generator=generator)
    sampling = SamplingParams(tokens, ignore_eos=True)
    with LocalEngine(config) as engine:
        for adapter in ADAPTERS:
            engine.register(adapter, folder / "adapters", adapter)
        prompts: list[list[int]] = ids.tolist()
        answers = engine.generate(
            [(p, m, sampling) for p, m in zip(prompts, MIXTURES, strict=True)]
        )
        error = logits_error(engine, peft, ids[0])
        wrong = 0
        for prompt, mixture, answer in zip(prompts, MIXTURES, answers, strict=True):
            with oracle.by_hand(peft, mixture) as reference:
                wrong += wrong_tokens(reference, prompt, answer)
        return {
            "name": name,
            "quantization": engine.base.quantization,
            "forward": type(engine.engine.runner.forward).__name__,
            "device": str(engine.base.decoder.device),
            "bits": round(8 * engine.base.linear_bytes / engine.base.shape.linear_parameters, 3),
            "logits": error,
            "tokens": sum(map(len, answers)),
            "wrong_tokens": wrong,
        }


@torch.no_grad()
def logits_error(engine: LocalEngine, peft: Any, ids: Tensor) -> float:
    """Relative error of the base's logits for ids [length], by the weights that the engine has."""
    decoder, length = engine.base.decoder, len(ids)
    attention = DenseCausal(1, length, engine.base.shape.sliding_window)
    on_device = ids.to(decoder.device)
    positions = torch.arange(length, device=decoder.device)
    got = decoder.logits(decoder.hidden(on_device, positions, attention)).float().cpu()
    with peft.disable_adapter():
        want = peft(input_ids=ids[None]).logits[0]
    return float((got - want).norm() / want.norm())


@torch.no_grad()
def wrong_tokens(model: Any, prompt: list[int], answer: list[int]) -> int:
    """Tokens of an answer whose logit is further than NEAR below the largest one there."""
    ids = torch.tensor([prompt + answer])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    largest = logits.max(dim=-1).values
    taken = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return int((largest - taken > NEAR * logits.abs().amax(dim=-1)).sum())


if __name__ == "__main__":
    main()
