"""The C library's memory in a process that serves for months."""

from __future__ import annotations

import ctypes

_M_ARENA_MAX = -8  # of glibc's malloc.h
ARENAS = 2


def limit_arenas() -> bool:
    """Keep glibc's allocator from growing a heap a thread; whether it could be told.

    gRPC's threads allocate and free for each call, whichever of them serves it: with eight heaps a
    core, memory that is free in one is asked of the kernel in another, and the process grows for
    hours. Other C libraries are left as they are. Call it before threads are started.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    return bool(mallopt(_M_ARENA_MAX, ARENAS))
