"""Start-up time and memory of the server, for ``overhead``."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.local import LocalEngine
from benchmarks.served import Served
from benchmarks.workload import Workload, mixtures
from mora_serve.client import Client
from mora_serve.config import AdaptersConfig, BaseConfig, Config
from mora_serve.demo.process import ServerProcess

# What a server imports; the tokenizer and the 4-bit product are imported when they are needed.
IMPORTS = """
import json, transformers, bitsandbytes
from mora_serve.server import app
from mora_serve.engine import engine
from benchmarks.footprint import resident
print(json.dumps(resident("self")))
"""
KERNEL_NAMES = {"RssAnon": "anonymous", "RssFile": "file", "RssShmem": "shared"}


def startup(starts: int) -> dict[str, Any]:
    """Seconds from starting ``mora-serve serve`` on the bundled models to its first whole answer.

    The median of some starts; the first one may read from the disk what later ones find in memory.
    """
    seconds = []
    for _ in range(starts):
        start = time.perf_counter()
        with ServerProcess() as process, Client(process.address) as client:
            process.wait_until_ready(client)
            ready = time.perf_counter() - start
            answer = client.generate("reverse 'stone'")
            seconds.append(time.perf_counter() - start)
        report.log(f"ready after {ready:.2f} s, {answer.text!r} after {seconds[-1]:.2f} s")
    return {"seconds": statistics.median(seconds), "first": seconds[0], "all": seconds}


def memory_by_part(root: Path, work: Workload, requests: int) -> dict[str, Any]:
    """Bytes of each part of a server that answers ``requests`` streams with distinct adapters.

    Python and libraries: the resident memory of a process that has imported all and loaded nothing.
    The other parts are what their tensors hold. The resident memory of the server itself, after its
    start and after the streams, is given beside them.
    """
    work.write_base(root / "base")
    names = work.write_adapters(root / "adapters", requests)
    slots = max(32, requests)
    flags = {"adapters.max_rank": work.rank, "adapters.slots": slots}
    with Served(root, names, flags) as served:
        idle = resident(served.pid)
        served.run(work.prompts(requests, 0), mixtures(requests, requests, 1), min(64, work.tokens))
        busy = resident(served.pid)
    libraries = subprocess.run(
        [sys.executable, "-c", IMPORTS], cwd=report.ROOT, capture_output=True, check=True
    ).stdout
    config = Config(
        BaseConfig(str(root / "base")),
        adapters=AdaptersConfig(slots=slots, max_rank=work.rank),
    )
    with LocalEngine(config) as local:
        kv = local.engine.runner.kv
        parts = {
            "base, 4-bit linears": local.base.linear_bytes,
            "base, embedding and head": local.base.other_bytes,
            f"{slots} adapter slots": local.engine.pool.slots.nbytes,
            "key/value pages": kv.k.nbytes + kv.v.nbytes,
        }
    return {
        "bytes": {**parts, "Python and libraries": sum(json.loads(libraries).values())},
        "a_slot": parts[f"{slots} adapter slots"] // slots,
        "server_resident": {"after the start": idle, f"after {requests} streams": busy},
        "server_resident_bytes": sum(busy.values()),
    }


def resident(pid: int | str) -> dict[str, int]:
    """Resident memory of a process in bytes: anonymous, of mapped files, shared."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in KERNEL_NAMES:
            found[KERNEL_NAMES[name]] = 1024 * int(value.split()[0])
    return found
