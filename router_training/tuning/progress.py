"""Where a run of several adapters is: held-out losses, the best of each adapter, and a checkpoint.

It goes on from a checkpoint to the bit: nothing in it is random but the rows' order, which the seed
gives again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mora_serve.model.stacked import StackedAdapters
from router_training.batched import copy_into, subset

CHECKPOINT = "together.pt"
Losses = Callable[[StackedAdapters], Mapping[int, float]]


class Progress:
    """Evaluates, keeps and saves every so many steps; see ``batched.Follower``.

    ``losses`` gives the held-out loss of each adapter that has such rows. After ``patience``
    evaluations in which no adapter got better the run ends; 0 is never. ``say`` gets a step and the
    mean of these losses. Once ``stop`` says so the run ends with the step, saved.
    """

    def __init__(
        self,
        file: Path,
        every: int,
        losses: Losses,
        say: Callable[[int, float], None],
        *,
        patience: int = 0,
        best: bool = True,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._file, self._every, self._losses, self._say = file, every, losses, say
        self._patience, self._keep, self._stop = patience, best, stop
        self._least: dict[int, float] = {}
        self._best: StackedAdapters | None = None
        self._waited = 0

    def begin(self, adapters: StackedAdapters, optimizer: Any, schedule: Any) -> int:
        """Take up what the checkpoint has, if there is one; the steps that are done."""
        if not self._file.exists():
            return 0
        saved = torch.load(self._file, weights_only=True)
        adapters.load_state_dict(saved["adapters"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        self._least, self._waited = saved["least"], saved["waited"]
        if saved["best"] is not None:
            self._best = _copy(adapters)
            self._best.load_state_dict(saved["best"])
        return int(saved["step"])

    def after(self, step: int, adapters: StackedAdapters, optimizer: Any, schedule: Any) -> bool:
        """Take note of a step; whether the run ends with it."""
        if step % self._every:
            if self._stop():
                self._save(step, adapters, optimizer, schedule)
            return self._stop()
        found = self._losses(adapters)
        if found:
            self._say(step, sum(found.values()) / len(found))
        better = [i for i, loss in found.items() if loss < self._least.get(i, math.inf)]
        self._waited = 0 if better else self._waited + bool(found)
        self._least |= {i: found[i] for i in better}
        if self._keep and better:
            self._best = self._best or _copy(adapters)
            for i in better:
                copy_into(adapters, i, self._best, i)
        self._save(step, adapters, optimizer, schedule)
        return self._stop() or (bool(self._patience) and self._waited >= self._patience)

    def best(self, adapters: StackedAdapters) -> StackedAdapters:
        """Each adapter where its held-out loss was least; the last where that is not known."""
        if self._best is None:
            return adapters
        for i in self._least:
            copy_into(self._best, i, adapters, i)
        return adapters

    def _save(self, step: int, adapters: StackedAdapters, optimizer: Any, schedule: Any) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        whole = self._file.with_suffix(".new")
        torch.save(
            {
                "step": step,
                "adapters": adapters.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "least": self._least,
                "waited": self._waited,
                "best": None if self._best is None else self._best.state_dict(),
            },
            whole,
        )
        os.replace(whole, self._file)


def _copy(adapters: StackedAdapters) -> StackedAdapters:
    return subset(adapters, range(adapters.count))
