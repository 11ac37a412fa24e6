"""Tests marked ``gpu`` are skipped where torch sees no CUDA device; no example has a deadline.

Without a card, Triton interprets its kernels on the CPU. It reads that choice when it is first
imported, by whomever, so it is made here, before any test module.
"""

from __future__ import annotations

import ctypes
import os
from importlib.metadata import version

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # nothing here asserts on time
settings.load_profile("untimed")


def sees_a_card() -> bool:
    """Whether torch would see a CUDA device. Importing it to ask would take seconds."""
    if version("torch").endswith("+cpu"):
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return driver.cuInit(0) == 0


if not sees_a_card():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(
                pytest.mark.skip(reason="no CUDA device; `make bench-gpu` runs these on one")
            )
