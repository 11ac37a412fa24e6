"""A training run that is killed and goes on ends with the same weights as one that is not.

The same settings twice: once in one go, once killed (SIGKILL) as soon as a checkpoint of its middle
is whole, then started again. The adapters' files are compared byte by byte.

    python -m benchmarks.resumed --json
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.tuning_rows import reported, task_rows, trainer, write_chats, write_settings

WAIT_SECONDS = 300.0


def main() -> None:
    """Measure, print, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--dropout", type=float, default=0.1)
    reported(measure, parser)


def measure(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Whether the weights are the same, and where the killed run had come to."""
    chats = write_chats(root / "chats.jsonl", task_rows("spell", 200))
    files = []
    killed = 0
    for name in ("whole", "killed"):
        config = write_settings(
            root / f"{name}.yaml",
            {
                "base_model": "demo",
                "datasets": [{"path": chats}],
                "output_dir": root / name,
                "max_steps": args.steps,
                "save_steps": 5,
                "eval_steps": 5,
                "lora_dropout": args.dropout,
                "learning_rate": 1e-3,
            },
        )
        if name == "killed":
            killed = kill_in_the_middle(config, root / name / "checkpoints", args.steps)
        done = trainer("adapter", config)
        if done.returncode:
            raise RuntimeError(f"{name}: the run ended with status {done.returncode}")
        files.append((root / name / "adapter" / "adapter_model.safetensors").read_bytes())
    return {"identical": int(files[0] == files[1]), "killed_at": killed, "steps": args.steps}


def kill_in_the_middle(config: Path, checkpoints: Path, steps: int) -> int:
    """Start a run and kill it once a checkpoint of its middle is whole; that one's step."""
    command = [sys.executable, "-m", "router_training", "adapter", str(config)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        end = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < end and run.poll() is None:
            whole = [p.parent for p in checkpoints.glob("checkpoint-*/trainer_state.json")]
            found = [int(p.name.rpartition("-")[2]) for p in whole]
            if found and max(found) >= steps // 3:
                run.kill()
                run.wait()
                if max(found) >= steps:
                    raise RuntimeError("the run was over before it was killed")
                return max(found)
            time.sleep(0.005)
        run.kill()
    raise RuntimeError("no checkpoint came, or the run was over before one was seen")


if __name__ == "__main__":
    main()
