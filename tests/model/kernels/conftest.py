"""Kernels run on the card where there is one, else in Triton's interpreter (tests/conftest.py).

The interpreter cuts float32 off where a card rounds it to bfloat16 (Triton 3.9). Here it rounds,
so that tests may ask for the very roundings of a card.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:  # no wheels for this system
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def rounding() -> Iterator[None]:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cut_off = InterpreterBuilder.cast_impl

    def cast(self: InterpreterBuilder, source: TensorHandle, kind: tl.dtype) -> TensorHandle:
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return cut_off(self, source, kind)
        wide = torch.from_numpy(np.array(source.data, dtype=np.float32))
        bits = wide.bfloat16().view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(bits, kind.scalar)

    InterpreterBuilder.cast_impl = cast
    yield
    InterpreterBuilder.cast_impl = cut_off
