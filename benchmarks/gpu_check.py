"""On a machine with a card: the tests marked ``gpu``, then a first measurement, as one JSON.

    python -m benchmarks.gpu_check --out gpu.json

What fails is recorded as failed and does not stop the rest. Exits with 1 if a test or the
measurement failed, with 2 where torch sees no CUDA device.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT, emit, environment, log
from mora_serve.errors import MoraError


def run_tests(timeout: float) -> dict[str, Any]:
    """Run pytest on the ``gpu`` marker; returns counts, seconds and the failed tests' names."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}"]
        start = time.monotonic()
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=sys.stderr, timeout=timeout, check=False
            )
            status = done.returncode
        except subprocess.TimeoutExpired:
            status = -1
        result: dict[str, Any] = {"status": status, "seconds": time.monotonic() - start}
        if report.exists():
            suites = list(ET.parse(report).getroot().iter("testsuite"))  # noqa: S314 - our own file
            for name in ("tests", "failures", "errors", "skipped"):
                result[name] = sum(int(suite.get(name, 0)) for suite in suites)
            result["failed"] = [
                f"{case.get('classname')}::{case.get('name')}"
                for suite in suites
                for case in suite.iter("testcase")
                if case.find("failure") is not None or case.find("error") is not None
            ]
        return result


def card() -> dict[str, Any]:
    """The card as torch sees it, with the rates that bound a decode step.

    ``copy_bytes_per_second`` counts bytes read and written by a device copy of 2 GiB (less on a
    small card); ``bf16_flops`` a product of two 8192 x 8192 matrices.
    """
    import torch

    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    size = min(2 << 30, properties.total_memory // 8)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)

    def seconds(work: Callable[[], object], repeat: int = 10) -> float:
        work()
        times = []
        for _ in range(repeat):
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return sorted(times)[repeat // 2]

    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "copy_bytes_per_second": 2 * size / seconds(lambda: target.copy_(source)),
        "bf16_flops": 2 * 8192**3 / seconds(lambda: a @ a),
    }


def first_figures(sizes: Sequence[int], tokens: int = 128) -> dict[str, Any]:
    """Tokens a second of a served random NF4 Llama, base alone, at 1, 4, 16 and 64 requests.

    ``sizes``: hidden, intermediate, layers, vocabulary. Whole requests of 32 prompt tokens.
    """
    from benchmarks import memory
    from benchmarks.served import ask_all
    from benchmarks.workload import Workload
    from mora_serve.client import Client
    from mora_serve.demo.process import ServerProcess

    hidden, intermediate, layers, vocabulary = sizes
    prompts = Workload(vocabulary=vocabulary).prompts
    with tempfile.TemporaryDirectory() as folder:
        log("writing a random model ...")
        config = memory.llama_config(hidden, intermediate, layers, vocabulary)
        size = memory.write_model(Path(folder), config)
        flags = {"base.model": folder, "base.device": "cuda"}
        with ServerProcess(flags) as server, Client(server.address, timeout=600.0) as client:
            ready = server.wait_until_ready(client, timeout=900.0)
            rows = []
            for count in (1, 4, 16, 64):
                runs = [
                    asyncio.run(ask_all(server.address, prompts(count, i), [{}] * count, tokens))
                    for i in range(4)
                ]
                rate = statistics.median(run.rate() for run in runs[1:])
                rows.append({"requests": count, "tokens_per_second": rate})
                log(str(rows[-1]))
    return {"sixteen_bit_bytes": size, "ready_seconds": ready, "rows": rows}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for the tests")
    args = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        log("error: torch sees no CUDA device; run this on a machine with a card")
        return 2
    result: dict[str, Any] = {**environment(), "card": card(), "tests": run_tests(args.timeout)}
    try:
        result["figures"] = first_figures((2048, 5632, 22, 32000))
    except (MoraError, RuntimeError) as e:
        result["figures"] = {"error": str(e)}
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    emit(result)
    return 0 if result["tests"]["status"] == 0 and "error" not in result["figures"] else 1


if __name__ == "__main__":
    sys.exit(main())
