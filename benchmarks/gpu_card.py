"""A card's rates, and the clock that measurements on it share."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.report import log


def found(interpret: bool) -> bool:
    """Whether there is a card, or Triton is to interpret kernels instead; says so where not."""
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        log("error: torch sees no CUDA device; run this on a machine with a card, or --interpret")
        return False
    return True


def wait(device: torch.device) -> None:
    """Until the device has done what was launched; at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device, repeat: int = 10) -> float:
    """The median time of ``work`` by the host's clock, the device's work included."""
    work()
    times = []
    for _ in range(repeat):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rates(device: torch.device, copied: int = 2 << 30, side: int = 8192) -> dict[str, Any]:
    """The device as torch sees it, with the rates that bound a step.

    ``copy_bytes_per_second`` counts bytes read and written by a device copy of ``copied`` bytes
    (less on a small card); ``bf16_flops`` a product of two matrices of ``side`` x ``side``.
    """
    about: dict[str, Any] = {"device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        copied = min(copied, properties.total_memory // 8)
        about = {
            "device": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device).bfloat16()
    return {
        **about,
        "copy_bytes_per_second": 2 * copied / seconds(lambda: target.copy_(source), device),
        "bf16_flops": 2 * side**3 / seconds(lambda: a @ a, device),
    }
