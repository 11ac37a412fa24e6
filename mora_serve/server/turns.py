"""Threads that serve tenants in turn: whoever has little to do waits for one piece of each other's.

A pool of threads has one line, in which a tenant with a hundred pieces of work stands before
everybody who comes later.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from mora_serve.server import call as calls

P = ParamSpec("P")
T = TypeVar("T")


def _whose() -> str:
    call = calls.found()
    return call.tenant if call else ""


class TurnExecutor(Executor):
    """A line for each tenant; a thread takes the first piece of the tenant whose turn it is.

    So between two pieces of a tenant's work each other tenant that waits gets one. ``whose`` says,
    on the thread that submits, whose the work is: the tenant of the call in progress.
    """

    def __init__(self, threads: int, name: str, whose: Callable[[], str] = _whose) -> None:
        self._whose = whose
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        # All of them from the start: a pool that still grows looks like a leak.
        self._beginning = threading.Barrier(threads)
        try:
            for _ in range(threads):
                self._threads.submit(self._beginning.wait)
        except RuntimeError:  # the system has no more: those that began would wait for ever
            self._threads.shutdown(wait=False)
            self._beginning.abort()
            raise
        self._lock = threading.Lock()
        self._lines: dict[str, deque[tuple[Future[Any], Callable[[], Any]]]] = {}  # by turn

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Put a piece of work at the end of its tenant's line. RuntimeError after ``shutdown``."""
        tenant, future = self._whose(), Future[T]()
        with self._lock:
            self._threads.submit(self._work)  # one of the threads comes for each piece
            line = self._lines.setdefault(tenant, deque())
            line.append((future, lambda: fn(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As of every executor: with ``cancel_futures`` what waits is dropped."""
        with self._lock:
            dropped = [future for line in self._lines.values() for future, _ in line]
            if cancel_futures:
                self._lines.clear()
            self._threads.shutdown(wait=False, cancel_futures=cancel_futures)
            self._beginning.abort()  # no thread waits for one that will not begin
        if cancel_futures:
            for future in dropped:  # without the lock: whoever waits is called
                future.cancel()
        self._threads.shutdown(wait=wait)

    def _work(self) -> None:
        taken = self._next()
        if taken is None:
            return  # what this thread came for was cancelled
        future, work = taken
        try:
            result = work()
        except BaseException as e:
            future.set_exception(e)
        else:
            future.set_result(result)
        finally:
            del taken, future, work  # an error refers to this frame, which must not refer to it

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        """The next piece that somebody still waits for; its tenant's next turn is the last."""
        with self._lock:
            while self._lines:
                tenant, line = next(iter(self._lines.items()))
                del self._lines[tenant]
                while line:
                    piece = line.popleft()
                    if piece[0].set_running_or_notify_cancel():
                        if line:
                            self._lines[tenant] = line
                        return piece
        return None
