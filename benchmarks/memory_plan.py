"""The memory plan: how long it takes for shapes without weights, and how near a run it comes.

Configurations of three large models, without weights, are planned for by the command itself,
imports included. Then a Llama of 100M parameters (or another size by flags) is planned for and
trained on for a few steps, on the CPU; the peak is what the process held at most, less what it
held before the model was loaded. glibc's malloc is told to give large blocks back as they are
freed: what it keeps otherwise is not the run's, and a third more.

    python -m benchmarks.memory_plan --json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import memory
from benchmarks.tuning_rows import reported, trainer, write_settings

Sizes = tuple[int, int, int, int, int, int]  # hidden, inner, layers, heads, their kv, vocabulary
SHAPES: Mapping[str, tuple[str, Sizes]] = {
    "Llama-3.1-8B": ("llama", (4096, 14336, 32, 32, 8, 128256)),
    "Qwen2.5-7B": ("qwen2", (3584, 18944, 28, 28, 4, 152064)),
    "Llama-3-70B": ("llama", (8192, 28672, 80, 64, 8, 128256)),
}
# Memory is asked of the system block by block, and given back so.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def main() -> None:
    """Measure, print, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    reported(measure, parser)


def measure(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and figures of the plans, and a run's peak beside its own."""
    (root / "rows.jsonl").write_text(rows(2 * args.rows, args.length))
    result = {"plans": planned(root), **run(root, args)}
    result["slowest_seconds"] = max(plan["seconds"] for plan in result["plans"].values())
    return result


def rows(count: int, length: int) -> str:
    """Rows of as many bytes, each a token of the byte tokenizer."""
    texts = (chr(97 + i % 26) * length for i in range(count))
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def settings(root: Path, base: Path, args: Mapping[str, Any]) -> Path:
    """The YAML file of a run on a base."""
    return write_settings(
        root / f"{base.name}.yaml",
        {
            "base_model": base,
            "datasets": [{"path": root / "rows.jsonl", "type": "completion"}],
            "output_dir": root / f"{base.name}-out".lower(),
            "val_set_size": 0,
            **args,
        },
    )


def planned(root: Path) -> dict[str, Any]:
    """Of each shape: seconds, GiB, and whether a card of 48 GiB holds it."""
    found = {}
    for name, (kind, (hidden, inner, layers, heads, own, vocabulary)) in SHAPES.items():
        base = root / name
        base.mkdir()
        config = {
            **memory.llama_config(hidden, inner, layers, vocabulary),
            "model_type": kind,
            "num_attention_heads": heads,
            "num_key_value_heads": own,
        }
        (base / "config.json").write_text(json.dumps(config))
        values = {"micro_batch_size": 1, "gradient_checkpointing": True}
        file = settings(root, base, values)
        started = time.monotonic()
        done = trainer("plan", file, "--card", 48, "--json")
        seconds = time.monotonic() - started
        plan = json.loads(done.stdout)
        found[name] = {"seconds": seconds, "gib": plan["total"] / 2**30, "fits": plan["fits"]}
    return found


def run(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The plan of a run that can be done here, beside its peak."""
    base = root / "base"
    base.mkdir()
    config = memory.llama_config(args.hidden, args.intermediate, args.layers, args.vocabulary)
    memory.write_model(base, config)
    values = {"micro_batch_size": args.rows, "sequence_len": args.length, "max_steps": 3}
    file = settings(root, base, values)
    plan = json.loads(trainer("plan", file, "--cpu", "--json").stdout)
    done = trainer("adapter", file, environment=GIVES_BACK)
    if done.returncode:
        raise RuntimeError(f"the run ended with status {done.returncode}")
    manifest = json.loads((root / "base-out" / "adapter" / "manifest.json").read_text())
    peak = manifest["metrics"]["peak_bytes"]
    return {
        "planned_bytes": plan["total"],
        "peak_bytes": peak,
        "off": abs(plan["total"] / peak - 1),
        "parts": plan["parts"],
    }


if __name__ == "__main__":
    main()
