"""Ctrl-C during a run: the first saves after the step that is under way, another stops at once."""

from __future__ import annotations

import math
import signal
import sys
import time
from types import FrameType
from typing import Any

import torch

from router_training.tuning import ranks

# Launchers pass a signal on that a terminal has sent to all processes anyway.
SAME_SECONDS = 1.0


class Interrupts:
    """Takes SIGINT from ``begin`` to ``end``; ``wished`` says whether it came."""

    def __init__(self) -> None:
        self.wished = False
        self._at = math.inf
        self._before: Any = None

    def begin(self) -> None:
        """Take the signal."""
        self._before = signal.signal(signal.SIGINT, self._note)

    def end(self) -> None:
        """Give it back."""
        signal.signal(signal.SIGINT, self._before)

    def agreed(self) -> bool:
        """Whether it came to any of several processes: they stop after the same step."""
        if ranks.count() > 1:
            flag = torch.tensor([float(self.wished)])
            if torch.distributed.get_backend() == "nccl":
                flag = flag.cuda()
            torch.distributed.all_reduce(flag)
            self.wished = bool(flag.item())
        return self.wished

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.wished and now - self._at > SAME_SECONDS:
            raise KeyboardInterrupt
        if not self.wished and ranks.first():
            print("\nsaving after this step; again to stop at once", file=sys.stderr, flush=True)
        self.wished, self._at = True, min(self._at, now)
