"""A decode step's time against the bytes that it must move and the bare 4-bit products it contains.

The engine is driven in-process on the workload of ``throughput``. For each number of requests and
kind of mixtures, rounds of decode steps (scheduler, forward, sampling: all but gRPC) alternate with
the same 4-bit products alone, on the same threads and weights, and with copies of a large block of
memory. Medians count; a step's phases, which say where the rest of the time goes, are means.

    python -m benchmarks.step --json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.local import LocalEngine
from benchmarks.tables import STEP_HEADERS, over_products, step_cells
from benchmarks.throughput import adapters_of
from benchmarks.workload import Workload
from mora_serve.cli.output import table
from mora_serve.config import AdaptersConfig, BaseConfig, Config, EngineConfig
from mora_serve.core import Event, SamplingParams
from mora_serve.engine.native_forward import NativeForward
from mora_serve.engine.pace import MIN_TOKENS
from mora_serve.engine.runner import allowed_cores
from mora_serve.model.native.library import PHASES
from mora_serve.model.native.weight import NativeLinear
from mora_serve.model.shape import PROJECTIONS

COPY_BYTES = 1 << 28

ENGINE = "engine"  # what no phase of the forward accounts for: scheduling, sampling, events
CASES = ((1, "none"), (16, "none"), (16, "one"), (16, "distinct"), (16, "mixtures"))


def main() -> None:
    """Measure, print a table, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="of each round")
    Workload.add_arguments(parser)
    args = parser.parse_args()
    work = Workload.of(args)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), work, args.rounds, args.steps)
    report.log(as_table(rows))
    report.emit(
        {
            "rows": rows,
            "figures": {
                f"{r['adapters']}_{r['requests']}_over_products": over_products(r) for r in rows
            },
            "arguments": vars(args),
            "environment": report.environment(),
        }
    )


def measure(root: Path, work: Workload, rounds: int, steps: int) -> list[dict[str, Any]]:
    """A row a case. Raises RuntimeError where the native path is not built."""
    most = max(count for count, _ in CASES)
    work.write_base(root / "base")
    names = work.write_adapters(root / "adapters", most)
    config = Config(
        BaseConfig(str(root / "base")),
        EngineConfig(prefix_cache=False),
        AdaptersConfig(slots=most, max_rank=work.rank),
    )
    with LocalEngine(config) as local:
        if not isinstance(local.engine.runner.forward, NativeForward):
            raise RuntimeError("the compiled CPU path is not built, so there is nothing to compare")
        for name in names:
            local.register(name, root / "adapters", name)
        local.make_resident(names)
        copies: list[float] = []
        rows = [case(local, work, count, kind, rounds, steps, copies) for count, kind in CASES]
    bandwidth = 2 * COPY_BYTES / statistics.median(copies)
    for row in rows:
        row["copy_bytes_per_second"] = bandwidth
        row["bytes_seconds"] = sum(row["bytes"].values()) / bandwidth
    return rows


def case(
    local: LocalEngine,
    work: Workload,
    count: int,
    kind: str,
    rounds: int,
    steps: int,
    copies: list[float],
) -> dict[str, Any]:
    """One case: seconds of a step and of its bare products; those of copies go to ``copies``.

    Raises RuntimeError where a request ended while steps were timed.
    """
    forward = local.engine.runner.forward
    assert isinstance(forward, NativeForward)
    wanted = adapters_of(kind, count)
    timed_tokens = (rounds + 1) * steps
    # the first requests decode while the last prompts are still computed
    tokens = timed_tokens + count * -(-work.prompt // MIN_TOKENS) + 8
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    prompts = work.prompts(count, 0)
    requests = [local.request((p, m, sampling)) for p, m in zip(prompts, wanted, strict=True)]
    for request in requests:
        local.engine.submit(request)
    started: set[str] = set()
    while len(started) < count:
        started |= {e.request_id for e in local.step() if isinstance(e, Event) and e.tokens}
    products, copying = bare_products(local, forward, count), copy_seconds()
    took: dict[str, list[float]] = {"step": [], "products": []}
    for turn in range(rounds + 1):
        if turn == 1:  # the first round warms up
            for seconds in took.values():
                seconds.clear()
            forward.seconds = np.zeros(len(PHASES))
        took["step"] += [timed(local.engine.step) for _ in range(steps)]
        took["products"] += [next(products) for _ in range(steps)]
        copies.append(next(copying))
    if len(local.engine.scheduler.running) != count:
        raise RuntimeError("a request ended while steps were timed; give shorter prompts")
    assert forward.seconds is not None
    phases = dict(zip(PHASES, (forward.seconds / (rounds * steps)).tolist(), strict=True))
    phases[ENGINE] = statistics.mean(took["step"]) - sum(phases.values())
    forward.seconds = None
    for request in requests:
        local.engine.abort(request.id)
    local.engine.step()
    row = {
        "requests": count,
        "adapters": kind,
        "step_seconds": statistics.median(took["step"]),
        "products_seconds": statistics.median(took["products"]),
        "bytes": step_bytes(local, work, wanted, work.prompt + timed_tokens // 2),
        "phase_seconds": phases,
    }
    report.log(f"{count} {kind}: {row}")
    return row


def bare_products(local: LocalEngine, forward: NativeForward, rows: int) -> Iterator[float]:
    """Seconds of all the layers' products for so many rows, without anything between."""
    decoder, native = local.base.decoder, forward.native
    sites = [site for layer in decoder.layers for site in layer.sites.values()]
    linears = [NativeLinear(site) for site in sites]
    work = []
    for linear, site in zip(linears, sites, strict=True):
        outs, columns = sum(p.shape[0] for p in site.parts), site.parts[0].shape[1]
        x = torch.randn(rows, columns).to(native.dtype)
        work.append((linear.struct, x, torch.empty(rows, outs)))

    def run() -> None:
        for one in work:
            native.product(*one)

    while True:
        yield timed(run)


def copy_seconds() -> Iterator[float]:
    """Seconds that all cores take to copy ``COPY_BYTES``."""
    source, target = (torch.ones(COPY_BYTES, dtype=torch.uint8) for _ in range(2))
    while True:
        threads = torch.get_num_threads()
        torch.set_num_threads(allowed_cores())
        seconds = timed(lambda: target.copy_(source))
        torch.set_num_threads(threads)
        yield seconds


def step_bytes(
    local: LocalEngine, work: Workload, wanted: Sequence[Mapping[str, float]], context: int
) -> dict[str, int]:
    """Bytes that a step must read: each weight and each adapter in use once, each row's keys."""
    decoder, shape = local.base.decoder, local.base.shape
    size = decoder.dtype.itemsize
    adapter = sum(sum(shape.projection(p)) for p in PROJECTIONS) * shape.layers * work.rank * size
    token = 2 * shape.layers * shape.kv_heads * shape.head_dim * size
    return {
        "4-bit weights": sum(s.nbytes for layer in decoder.layers for s in layer.sites.values()),
        "head": decoder.head.nbytes,
        "adapters": adapter * len({name for mixture in wanted for name in mixture}),
        "keys and values": token * context * len(wanted),
    }


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All cases in milliseconds."""
    return table(STEP_HEADERS, step_cells(rows), right=range(1, len(STEP_HEADERS)))


if __name__ == "__main__":
    main()
