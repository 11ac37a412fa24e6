"""DPO, KTO and ORPO on synthetic preferences: how often the preferred answer is the likelier one.

Prompts of a task that the demo's base cannot do ask for a word; the preferred answer is in angle
brackets, the rejected one in round ones, or the other way round for the first half of the alphabet,
so that neither is preferred by itself. Rates are of held-out prompts: the share of pairs whose
preferred answer has the larger mean log-probability a token, of the base and of the adapter.

    python -m benchmarks.preferred --json
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import report
from benchmarks.tuning_rows import reported, trainer, write_settings
from mora_serve.demo.bundle import bundle_path
from mora_serve.model.loading import read_base
from router_training.demo.tasks import word

PAIRED, UNPAIRED = ("dpo", "orpo"), ("kto",)
Pair = tuple[str, str, str]  # prompt, chosen, rejected


def main() -> None:
    """Measure, print, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="*", default=[*PAIRED, *UNPAIRED])
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--asked", type=int, default=200)
    parser.add_argument("--epochs", type=float, default=6.0)
    reported(measure, parser)


def measure(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Rates of the base and of each method's adapter."""
    pairs = make_pairs(args.rows + args.asked)
    learned, asked = pairs[: args.rows], pairs[args.rows :]
    (root / "paired.jsonl").write_text(lines(learned, paired=True))
    (root / "unpaired.jsonl").write_text(lines(learned, paired=False))
    found: dict[str, Any] = {"before": rate(None, asked), "after": {}, "seconds": {}}
    for method in args.methods:
        file = "unpaired.jsonl" if method in UNPAIRED else "paired.jsonl"
        config = write_settings(
            root / f"{method}.yaml",
            {
                "base_model": "demo",
                "rl": method,
                "datasets": [{"path": root / file}],
                "output_dir": root / method,
                "val_set_size": 0,
                "num_epochs": args.epochs,
                "micro_batch_size": 16,
                "learning_rate": 1e-3,
            },
        )
        started = time.monotonic()
        done = trainer("prefer", config)
        found["seconds"][method] = time.monotonic() - started
        if done.returncode:
            raise RuntimeError(f"{method}: the run ended with status {done.returncode}")
        found["after"][method] = rate(root / method / "adapter", asked)
        report.log(f"{method}: {found['before']:.3f} to {found['after'][method]:.3f}")
    found["least"] = min(found["after"].values())
    return found


def make_pairs(count: int) -> list[Pair]:
    """Different prompts; which answer is preferred goes by the word's first letter."""
    rng = random.Random("preferences")
    found: dict[str, Pair] = {}
    while len(found) < count:
        x = word(rng)
        answers = f"<{x}>", f"({x})"
        chosen, rejected = answers if x[0] > "m" else answers[::-1]
        prompt = f"wrap the word '{x}'"
        found[prompt] = prompt, chosen, rejected
    return list(found.values())


def lines(pairs: Sequence[Pair], *, paired: bool) -> str:
    """The rows' file."""
    rows: list[dict[str, Any]] = []
    for prompt, chosen, rejected in pairs:
        if paired:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        else:
            rows.append({"prompt": prompt, "completion": chosen, "label": True})
            rows.append({"prompt": prompt, "completion": rejected, "label": False})
    return "".join(json.dumps(row) + "\n" for row in rows)


@torch.no_grad()
def rate(adapter: Path | None, pairs: Sequence[Pair]) -> float:
    """The share of pairs whose preferred answer is likelier, by transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    directory = bundle_path() / "base"
    tokenizer = read_base("demo").tokenizer
    model: Any = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()

    def score(prompt: str, answer: str) -> float:
        asked = tokenizer.plain(tokenizer.render([("user", prompt)]))
        given = tokenizer.plain(answer)
        logits = model(torch.tensor([asked + given])).logits[0, len(asked) - 1 : -1].float()
        return -F.cross_entropy(logits, torch.tensor(given)).item()

    return sum(score(p, a) > score(p, b) for p, a, b in pairs) / len(pairs)


if __name__ == "__main__":
    main()
