"""The router's inner loops in C, where there was a compiler; else their callers use numpy.

Each is some microseconds of work, so they keep Python's lock: to get it back beside a busy thread
would take longer.
"""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes import c_double, c_int, c_void_p
from functools import cache
from typing import Any

import numpy as np

VERSION = 3  # native.c's
LEAST = 1e-15  # native.c's: shorter vectors are nothing
_BYTE = ctypes.c_char * 1


@cache
def library() -> ctypes.PyDLL | None:
    """The compiled library, or None where it was not built or is of another version."""
    spec = importlib.util.find_spec("mora_serve.router._native")
    if spec is None or spec.origin is None or np.dtype(np.intp).itemsize != 8:
        return None
    try:
        lib = ctypes.PyDLL(spec.origin)
        if lib.mora_router_version() != VERSION:
            return None
    except (OSError, AttributeError):
        return None
    p, i = c_void_p, c_int
    lib.mora_search.argtypes = [p, p, i, p, i, p, i, i, p, p]
    lib.mora_scores.argtypes = [p, p, p, i, p, i, i, p, i, p, p]
    lib.mora_embed.argtypes = [p, p, p, i, p, p, i, p]
    lib.mora_embed_text.argtypes = [p, p, p, i, p, p, i, c_double, i, i, i, p, p]
    lib.mora_without.argtypes = [p, p, i, p, i]
    lib.mora_features.argtypes = [p, p, i, c_double, i, i, i, p]
    for function in (lib.mora_embed, lib.mora_embed_text, lib.mora_features):
        function.restype = None
    return lib


def address(array: Any) -> ctypes.Array[ctypes.c_char] | int:
    """Where a contiguous array is, as the library takes it: ``ctypes.data`` is 4 times slower."""
    try:
        return _BYTE.from_buffer(array)
    except (TypeError, ValueError):  # it cannot be written to, or is empty
        return int(array.ctypes.data)
