"""What a run says of itself: metrics.jsonl always, and a line that lives on a terminal."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from mora_serve.errors import InvalidArgument
from router_training.tuning import ranks
from router_training.tuning.interrupts import Interrupts

METRICS_FILE = "metrics.jsonl"


class Recorder(TrainerCallback):  # type: ignore[misc]  # transformers has no types for it
    """Follows TRL's trainers; the first interrupt saves a checkpoint and ends the run."""

    def __init__(self, out: Path, tokens_a_step: float = 0.0) -> None:
        """``tokens_a_step`` in the mean, for tokens a second; 0: they are not told."""
        self._file = out / METRICS_FILE
        self._tokens_a_step = tokens_a_step
        self._started = time.monotonic()
        self._first_step: int | None = None
        self._loss = self._held_out = math.nan
        self._live = sys.stderr.isatty()
        self._interrupts = Interrupts()
        self._running = False

    @property
    def interrupted(self) -> bool:
        """Whether the run was to stop early."""
        return self._interrupts.wished

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin a new file, unless the run goes on, and take the interrupt."""
        self._running = True
        self._started, self._first_step = time.monotonic(), state.global_step
        if not state.global_step and ranks.first():
            self._file.write_text("")
        self._interrupts.begin()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Give the interrupt back."""
        self._running = False
        self._interrupts.end()
        if self._live:
            print(file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Save and stop where an interrupt came."""
        if self._interrupts.agreed():
            control.should_save = control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write a line. Raises InvalidArgument for a loss that is no number."""
        values = {k: v for k, v in (logs or {}).items() if isinstance(v, (int, float))}
        for name in ("loss", "eval_loss", "grad_norm"):
            if name in values and not math.isfinite(values[name]):
                raise _no_number(name, state.global_step)
        if not (ranks.first() and self._running):
            return
        self._loss = values.get("loss", self._loss)
        self._held_out = values.get("eval_loss", self._held_out)
        line = {"step": state.global_step, "seconds": time.monotonic() - self._started, **values}
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if "train_runtime" not in values:
            self._show(state)

    def _show(self, state: Any) -> None:
        done = state.global_step - (self._first_step or 0)
        seconds = time.monotonic() - self._started
        left = seconds / done * (state.max_steps - state.global_step) if done else math.nan
        parts = [f"step {state.global_step}/{state.max_steps}", f"loss {self._loss:.4f}"]
        if math.isfinite(self._held_out):
            parts.append(f"held out {self._held_out:.4f}")
        if done:
            if self._tokens_a_step:
                parts.append(f"{done * self._tokens_a_step / seconds:.0f} tokens/s")
            parts.append(f"{left:.0f} s left")
        parts.append(f"{memory_bytes() / 1e9:.2f} GB")
        line = "  ".join(parts)
        print(
            f"\r{line:<100}" if self._live else line,
            end="" if self._live else "\n",
            flush=True,
            file=sys.stderr,
        )


class PlainRecorder:
    """Writes and shows the losses of a trainer without callbacks."""

    def __init__(self, out: Path, steps: int, *, goes_on: bool = False) -> None:
        self._file, self._steps = out / METRICS_FILE, steps
        if not goes_on:
            self._file.write_text("")
        self._started, self._first = time.monotonic(), 0
        self.last = 0  # step

    def step(self, step: int, loss: float) -> None:
        """A step's loss. Raises InvalidArgument for one that is no number."""
        if not math.isfinite(loss):
            raise _no_number("loss", step)
        self._first, self.last = self._first or step, step
        seconds = self._write(step, loss=loss)
        if step == self._first or step % 10 == 0 or step == self._steps:
            left = seconds / (step - self._first + 1) * (self._steps - step)
            parts = f"step {step}/{self._steps}  loss {loss:.4f}  {left:.0f} s left"
            print(f"{parts}  {memory_bytes() / 1e9:.2f} GB", file=sys.stderr, flush=True)

    def held_out(self, step: int, loss: float) -> None:
        """The loss of held-out rows."""
        self._write(step, eval_loss=loss)

    def _write(self, step: int, **values: float) -> float:
        seconds = time.monotonic() - self._started
        with self._file.open("a") as lines:
            lines.write(json.dumps({"step": step, "seconds": seconds, **values}) + "\n")
        return seconds


def _no_number(name: str, step: int) -> InvalidArgument:
    return InvalidArgument(
        f"learning_rate: {name} is no number at step {step}; give less, or look at the rows with "
        "`check`",
        field="learning_rate",
    )


def memory_bytes() -> int:
    """What the run holds: of the card where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return _status("VmRSS:")


def peak_bytes() -> int:
    """The most that it has held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM:")


def _status(key: str) -> int:
    """Of Linux's account of this process; 0 elsewhere."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), 0)
