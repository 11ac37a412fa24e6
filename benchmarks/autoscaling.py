"""A cluster that grows by its line, and its new replica: one with many callers, two are allowed.

Callers ask for a few adapters, without end, until a second replica is up: the seconds until then,
and how many of these adapters it had in slots when it was first seen, before it was asked for any.

    python -m benchmarks.autoscaling --json
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks import report
from benchmarks.local_cluster import LocalCluster
from mora_serve.client import Client
from mora_serve.demo.bundle import bundle_path
from mora_serve.errors import MoraError

CALLERS, ADAPTERS, TOKENS = 12, 6, 60
PATIENCE = 120.0  # seconds


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.parse_args()
    report.emit({**grown(), "environment": report.environment()})


def grown() -> dict[str, Any]:
    """Ask until there are two."""
    with tempfile.TemporaryDirectory() as state:
        flags = {
            "server.state": state,
            "adapters.root": str(bundle_path() / "adapters"),
            "cluster.replicas": 1,
            "cluster.max_replicas": 2,
            "cluster.target_requests": CALLERS / 3,
        }
        with (
            LocalCluster(flags) as cluster,
            Client(cluster.address, timeout=PATIENCE) as client,
            ThreadPoolExecutor(CALLERS) as callers,
        ):
            wanted = {a.name: a.digest for a in client.list_adapters()[:ADAPTERS]}
            over = threading.Event()

            def ask(first: int) -> int:
                names = list(wanted)
                failed = i = 0
                while not over.is_set():
                    name = names[(first + i) % ADAPTERS]
                    i += 1
                    try:
                        client.generate("x", adapters={name: 1.0}, max_tokens=TOKENS)
                    except MoraError:
                        failed += 1
                return failed

            asking = [callers.submit(ask, i) for i in range(CALLERS)]
            start = time.monotonic()
            try:
                seconds = cluster.wait_for(2, PATIENCE)
                newest = min(cluster.reports(), key=lambda r: r.generation_tokens)
            finally:
                over.set()
            failed = sum(a.result() for a in asking)
    return {
        "replicas": 2,
        "grown_seconds": seconds,
        "asked_seconds": time.monotonic() - start,
        "adapters": ADAPTERS,
        "warm_adapters": len(set(newest.resident) & set(wanted.values())),
        "warm_tokens": newest.generation_tokens,
        "failed": failed,
    }


if __name__ == "__main__":
    main()
