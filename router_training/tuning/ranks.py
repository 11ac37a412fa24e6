"""Which of several processes this is, as torchrun and `accelerate launch` say it."""

from __future__ import annotations

import os


def first() -> bool:
    """Whether this process writes and says what all of them did."""
    return int(os.environ.get("RANK", "0")) == 0


def device() -> int:
    """The index of this process's card on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def count() -> int:
    """How many processes share a step's rows."""
    return int(os.environ.get("WORLD_SIZE", "1"))
