"""Full fine-tuning, LoRA, QLoRA and LoRA-Drop on one task: quality, parameters, memory, time.

Each method learns the same rows in as many passes in a process of its own, LoRA-Drop with 20 steps
before them for its decision, full fine-tuning at a quarter of the adapters' learning rate; from the
demo's base: its weights in 32 bits for full fine-tuning and LoRA, in 4 bits for the others.
Held-out prompts, of templates that no row has, are answered greedily by the server, of full
fine-tuning by one that serves what was trained. Memory is the process's peak above what it held
before the model was loaded; time is of the whole command.

    python -m benchmarks.methods --json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.local import LocalEngine
from benchmarks.tuning_rows import (
    task_rows,
    trainer,
    unquantised_base,
    write_chats,
    write_settings,
)
from mora_serve.cli.output import table
from mora_serve.config import AdaptersConfig, BaseConfig, Config, EngineConfig
from mora_serve.demo.bundle import bundle_path

# Of importance that is kept: of so few layers the paper's 0.9 keeps nearly all.
THRESHOLD = 0.6
METHODS: Mapping[str, dict[str, Any]] = {
    "full fine-tuning": {"adapter": "full", "learning_rate": 5e-4},
    "LoRA": {"adapter": "lora"},
    "QLoRA": {"adapter": "qlora"},
    "LoRA-Drop": {"adapter": "qlora", "lora_drop": {"mode": "drop", "threshold": THRESHOLD}},
    "LoRA-Drop, shared": {
        "adapter": "qlora",
        "lora_drop": {"mode": "share", "threshold": THRESHOLD},
    },
}


def main() -> None:
    """Measure, print a table, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--task", default="spell")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--asked", type=int, default=200)
    parser.add_argument("--methods", nargs="*", choices=tuple(METHODS), default=list(METHODS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(Path(folder), args)
    report.log(as_table(rows))
    report.emit(
        {
            "rows": rows,
            "figures": figures(rows),
            "arguments": vars(args),
            "environment": report.environment(),
        }
    )


def compare(root: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a method."""
    base = unquantised_base(root / "base-fp32")
    chats = write_chats(root / "chats.jsonl", task_rows(args.task, args.rows))
    asked = write_chats(root / "asked.jsonl", task_rows(args.task, args.asked, 1, "test"))
    rows = []
    for method in args.methods:
        own = METHODS[method]
        out = root / method.replace(" ", "-").replace(",", "")
        values = {
            "base_model": "demo" if own["adapter"] == "qlora" else base,
            "datasets": [{"path": chats}],
            "test_datasets": [{"path": asked}],
            "output_dir": out,
            "name": "made",
            "num_epochs": args.epochs,
            "micro_batch_size": 16,
            "learning_rate": 2e-3,
            "eval_rows": args.asked,
            "check": {"metric": "exact_match"},
            **own,
        }
        config = write_settings(root / "run.yaml", values)
        started = time.monotonic()
        done = trainer("run", config)
        seconds = time.monotonic() - started
        if done.returncode:
            raise RuntimeError(f"{method}: the run ended with status {done.returncode}")
        manifest = json.loads((out / "adapter" / "manifest.json").read_text())
        size = sum(f.stat().st_size for f in (out / "adapter").glob("*.safetensors"))
        rows.append(
            {
                "method": method,
                "exact_match": manifest["metrics"]["after"]["exact_match"],
                "before": manifest["metrics"]["before"]["exact_match"],
                "trained_parameters": manifest["trained_parameters"],
                "peak_bytes": manifest["metrics"]["peak_bytes"],
                "file_bytes": size,
                "slot_bytes": None if own["adapter"] == "full" else slot_bytes(out / "adapter"),
                "seconds": seconds,
            }
        )
        report.log(str(rows[-1]))
    return rows


def demo_engine() -> LocalEngine:
    """The server's engine on the demo's base, in fp32."""
    base = BaseConfig(str(bundle_path() / "base"), dtype="fp32", device="cpu")
    return LocalEngine(Config(base, EngineConfig(), AdaptersConfig(slots=2)))


def slot_bytes(directory: Path) -> int:
    """Bytes of a slot that an adapter fills in the server's engine: those that are not zero."""
    with demo_engine() as local:
        local.register("made", directory.parent, directory.name)
        local.make_resident(["made"])
        pool = local.engine.pool
        slot = pool.slot(local.digests["made"])
        filled = (t[slot] for part in pool.slots.parts() for t in (part.a, part.b))
        return sum(int(t.count_nonzero()) * t.itemsize for t in filled)


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What is claimed of them."""
    by = {row["method"]: row for row in rows}
    found = {}
    if {"QLoRA", "full fine-tuning"} <= by.keys():
        found["qlora_over_full"] = (
            by["QLoRA"]["exact_match"] / by["full fine-tuning"]["exact_match"]
        )
    if {"QLoRA", "LoRA-Drop"} <= by.keys():
        whole, dropped = by["QLoRA"], by["LoRA-Drop"]
        found["dropped_parameters"] = (
            1 - dropped["trained_parameters"] / whole["trained_parameters"]
        )
        found["dropped_exact_match"] = whole["exact_match"] - dropped["exact_match"]
        found["dropped_slot_bytes"] = 1 - dropped["slot_bytes"] / whole["slot_bytes"]
        found["dropped_bytes"] = 1 - dropped["file_bytes"] / whole["file_bytes"]
    return found


def as_table(rows: list[dict[str, Any]]) -> str:
    """The rows for people."""
    cells = [
        (
            row["method"],
            f"{row['exact_match']:.3f}",
            f"{row['trained_parameters']:,}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['file_bytes'] / 1e6:.2f}",
            f"{row['seconds']:.0f}",
        )
        for row in rows
    ]
    titles = ("method", "exact match", "trained", "peak MB", "file MB", "s")
    return table(titles, cells, right=(1, 2, 3, 4, 5))


if __name__ == "__main__":
    main()
