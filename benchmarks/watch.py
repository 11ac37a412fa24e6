"""A server watched from outside while something happens to it: memory, descriptors, health.

with Watch(process.pid, process.address) as watch:
    ...
watch.growth(after=10.0), watch.health_ms
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

HEALTH_SECONDS, SAMPLE_SECONDS = 0.05, 0.5  # between two questions, between two looks
ASK_SECONDS = 5.0  # that an answer about health may take


@dataclass(frozen=True)
class Sample:
    """What the kernel says of a process, ``at`` seconds after the start of the watch."""

    at: float
    resident: int
    descriptors: int
    threads: int
    cpu_seconds: float


class Watch:
    """Looks at a process, and asks it for its health, until left."""

    def __init__(self, pid: int, address: str) -> None:
        self.samples: list[Sample] = []
        self.health_ms: list[float] = []
        self.unhealthy = 0  # answers that did not come or did not say SERVING
        self._pid, self._address = pid, address
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=run, daemon=True) for run in (self._ask, self._look)
        ]
        self._start = 0.0

    def __enter__(self) -> Watch:
        self._start = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    @property
    def now(self) -> float:
        """Seconds since the start of the watch."""
        return time.monotonic() - self._start

    def resident(self, start: float, end: float) -> float:
        """Resident memory between two times, in the median; negative times count from the end."""
        last = self.samples[-1].at
        start, end = (t if t >= 0 else last + t for t in (start, end))
        return statistics.median(s.resident for s in self.samples if start <= s.at <= end)

    def growth(self, after: float, over: float) -> float:
        """By what part resident memory has grown: the last seconds ``over`` those ``after``."""
        return self.resident(-over, self.samples[-1].at) / self.resident(after, after + over) - 1

    @property
    def cpu_seconds(self) -> float:
        """Processor time that the server took while it was watched."""
        return self.samples[-1].cpu_seconds - self.samples[0].cpu_seconds

    def _ask(self) -> None:
        options = (("grpc.enable_retries", 0),)
        with grpc.insecure_channel(self._address, options) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while not self._end.wait(HEALTH_SECONDS):
                start = time.perf_counter()
                try:
                    answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=ASK_SECONDS)
                    good = answer.status == health_pb2.HealthCheckResponse.SERVING
                except grpc.RpcError:
                    good = False
                self.health_ms.append(1e3 * (time.perf_counter() - start))
                self.unhealthy += not good

    def _look(self) -> None:
        self.samples.append(look(self._pid, 0.0))
        while not self._end.wait(SAMPLE_SECONDS):
            self.samples.append(look(self._pid, self.now))


def look(pid: int, at: float) -> Sample:
    """A process as it is now."""
    root = Path(f"/proc/{pid}")
    pages = int((root / "statm").read_text().split()[1])
    ticks = (root / "stat").read_text().rpartition(")")[2].split()
    return Sample(
        at,
        pages * os.sysconf("SC_PAGE_SIZE"),
        len(os.listdir(root / "fd")),
        len(os.listdir(root / "task")),
        (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK"),
    )
