"""Forgetting, with replay and without: what the base can do before and after an adapter learns.

The demo's base does operations that prompts name by codes. An adapter learns another task, from
prompts that look alike; once from its own rows alone, once with rows of the coded operations beside
them (``replay: true``). The quality check gets held-out rows of these operations as
``general_datasets``: it is to refuse the one that forgot, and to let the other pass.

    python -m benchmarks.forgetting --json
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.tuning_rows import Rows, reported, task_rows, trainer, write_chats, write_settings
from router_training.demo.coded import CodedRows
from router_training.demo.tasks import OPERATIONS


def main() -> None:
    """Measure, print, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="spell")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--general", type=int, default=100)
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--weight", type=float, default=1.0, help="of replayed rows")
    reported(measure, parser)


def coded(count: int, seed: str) -> Rows:
    """Different rows of operations by their codes."""
    rng = random.Random(f"forgetting/{seed}")
    draw, found = CodedRows(rng), dict[str, str]()
    while len(found) < count:
        row = draw.coded((rng.choice(OPERATIONS),))
        found[row.prompt] = row.answer
    return list(found.items())


def measure(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Exact matches of both runs, and what the check said."""
    own = write_chats(root / "own.jsonl", task_rows(args.task, args.rows))
    replay = write_chats(root / "replay.jsonl", coded(args.rows, "replay"))
    general = write_chats(root / "general.jsonl", coded(args.general, "held out"))
    found: dict[str, Any] = {}
    for name in ("without", "with"):
        datasets: list[dict[str, Any]] = [{"path": own}]
        if name == "with":
            datasets.append({"path": replay, "replay": True, "weight": args.weight})
        config = write_settings(
            root / f"{name}.yaml",
            {
                "base_model": "demo",
                "datasets": datasets,
                "general_datasets": [{"path": general}],
                "output_dir": root / name,
                "val_set_size": 64,
                "num_epochs": args.epochs,
                "micro_batch_size": 16,
                "learning_rate": 2e-3,
                "check": {"metric": "exact_match", "general_margin": 0.05},
            },
        )
        done = trainer("run", config)
        manifest = json.loads((root / name / "adapter" / "manifest.json").read_text())
        metrics = manifest["metrics"]
        if done.returncode != (0 if metrics["passed"] else 1):
            raise RuntimeError(f"{name} replay: the run ended with status {done.returncode}")
        found[name] = {
            "learned": metrics["after"]["exact_match"],
            "general_before": metrics["before"]["general"],
            "general_after": metrics["after"]["general"],
            "passed": metrics["passed"],
        }
        report.log(f"{name} replay: {found[name]}")
    found["refused_without"] = not found["without"]["passed"]
    found["passed_with"] = found["with"]["passed"]
    found["right"] = int(found["refused_without"] and found["passed_with"])
    return found


if __name__ == "__main__":
    main()
