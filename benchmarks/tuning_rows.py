"""Rows, preferences and bases that the adapter trainer's benchmarks learn from."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from benchmarks import report
from mora_serve.demo.bundle import bundle_path
from router_training.demo.tasks import TASKS, Split

Rows = list[tuple[str, str]]
Measure = Callable[[Path, argparse.Namespace], dict[str, Any]]


def reported(measure: Measure, parser: argparse.ArgumentParser) -> None:
    """Measure in a folder that is gone afterwards, and report."""
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args)
    report.log(str(result))
    report.emit({**result, "arguments": vars(args), "environment": report.environment()})


def task_rows(task: str, count: int, seed: int = 0, split: Split = "train") -> Rows:
    """Different prompts and answers of one of the demo's tasks."""
    return TASKS[task].examples(seed, count, split)


def write_chats(file: Path, rows: Iterable[tuple[str, str]]) -> Path:
    """One chat a line."""
    lines = (
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": answer},
                ]
            }
        )
        for prompt, answer in rows
    )
    file.write_text("\n".join(lines) + "\n")
    return file


def write_settings(file: Path, values: Mapping[str, Any]) -> Path:
    """The YAML file of a run; paths as text."""
    plain = json.loads(json.dumps(values, default=str))
    file.write_text(yaml.safe_dump(plain, sort_keys=False))
    return file


def trainer(
    command: str,
    config: Path,
    *overrides: object,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.CompletedProcess[str]:
    """Run a command of the trainer to its end; what it says of progress goes to stderr."""
    words = [sys.executable, "-m", "router_training", command, config, *overrides]
    return subprocess.run(
        [str(w) for w in words],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def unquantised_base(directory: Path) -> Path:
    """The demo's base with its weights in 32 bits, as its 4-bit ones say them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = bundle_path() / "base"
    four_bit = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.float32)
    config = AutoConfig.from_pretrained(str(source))
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(four_bit.dequantize().state_dict())
    model.save_pretrained(str(directory))
    AutoTokenizer.from_pretrained(str(source)).save_pretrained(str(directory))
    return directory
