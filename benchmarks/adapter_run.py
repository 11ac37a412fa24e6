"""From a file of chats to an adapter that a running server serves and routes to, in one command.

A server of the demo's base runs. ``python -m router_training run`` gets 400 chats of a task that
none of its adapters does; it trains, evaluates, checks and registers. Then prompts of templates
that were not among the chats are asked over gRPC: with the adapter by name, and left to the router
beside the bundle's adapters.

    python -m benchmarks.adapter_run --json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.tuning_rows import reported, task_rows, trainer, write_chats, write_settings
from mora_serve.client import Client
from mora_serve.demo.bundle import bundle_path
from mora_serve.demo.process import ServerProcess
from router_training.demo.tasks import KNOWN, LATE

NAME = "spelling"


def main() -> None:
    """Measure, print, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--asked", type=int, default=64)
    reported(measure, parser)


def measure(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the run, and how many answers are right, before and after."""
    bundle = bundle_path()
    flags = {"server.state": root / "state", "adapters.root": bundle / "adapters"}
    chats = write_chats(root / "chats.jsonl", task_rows(LATE, args.rows))
    asked = task_rows(LATE, args.asked, seed=1, split="test")
    with ServerProcess(flags) as server, Client(server.address, timeout=600.0) as client:
        server.wait_until_ready(client)
        for name in KNOWN:
            client.register_adapter(name, name)
        client.load_router(data=(bundle / "router" / "router.safetensors").read_bytes())
        base = right(client, asked, base=True)
        config = write_settings(
            root / "run.yaml",
            {
                "base_model": "demo",
                "datasets": [{"path": chats}],
                "output_dir": root / NAME,
                "num_epochs": args.epochs,
                "learning_rate": 2e-3,
                "val_set_size": 64,
                "register_to": server.address,
            },
        )
        started = time.monotonic()
        done = trainer("run", config)
        seconds = time.monotonic() - started
        if done.returncode:
            raise RuntimeError(f"the run ended with status {done.returncode}")
        manifest = json.loads((root / NAME / "adapter" / "manifest.json").read_text())
        adapted = right(client, asked, adapters={NAME: 1.0})
        chosen = [[a.adapter for a in client.route(p).mixture.adapters] for p, _ in asked]
        return {
            "seconds": seconds,
            "base_exact_match": base,
            "exact_match": adapted,
            "routed": sum(NAME in names for names in chosen) / len(chosen),
            "metrics": manifest["metrics"],
        }


def right(client: Client, rows: list[tuple[str, str]], **selection: Any) -> float:
    """The part of greedy answers that are right to the letter."""
    answers = [
        client.generate(prompt, temperature=0.0, max_tokens=64, **selection).text
        for prompt, _ in rows
    ]
    return sum(a == b for a, (_, b) in zip(answers, rows, strict=True)) / len(rows)


if __name__ == "__main__":
    main()
