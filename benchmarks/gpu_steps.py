"""Steps of the whole engine on a random base: decoding, first tokens, loads beside streams.

Scheduler, forward, sampling and events are in every time, gRPC is not. A decode step's floor is the
time that a copy of as many bytes as it must read would take: 4-bit weights, head, each adapter in
use once, keys and values.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_base import add_adapters
from benchmarks.local import LocalEngine
from benchmarks.report import log
from mora_serve.config import AdaptersConfig, BaseConfig, Config, EngineConfig
from mora_serve.core import AdapterLoad, Event, SamplingParams
from mora_serve.model.loading import Base
from mora_serve.model.shape import PROJECTIONS

# (requests, kind of mixtures): those that the claims name
CASES = (
    *((1, "none"), (1, "distinct"), (16, "none"), (16, "distinct")),
    *((32, "none"), (32, "distinct"), (32, "mixtures"), (64, "none"), (64, "distinct")),
)


@dataclass(frozen=True)
class Sizes:
    """How much is measured: most requests, their prompts, decode steps timed, adapters' rank."""

    requests: int = 64
    prompt: int = 128
    steps: int = 48
    rank: int = 16
    long_prompt: int = 512
    streams: int = 32
    repeat: int = 7
    load_turns: int = 4
    load_seconds: float = 0.75  # a turn
    context: int = 8192

    @property
    def adapters(self) -> int:
        """One for each request of the largest case."""
        return self.requests


TINY = Sizes(2, 3, 1, 4, 5, 1, 0, 1, 0.0, 64)  # for the interpreter


def make_engine(base: Base, sizes: Sizes, device: str, kernels: str = "auto") -> LocalEngine:
    """An engine with slots for all adapters of the cases and some more, for those that load."""
    return LocalEngine(
        Config(
            BaseConfig(device=device),
            EngineConfig(
                max_batch=sizes.requests,
                max_context=sizes.context,
                prefix_cache=False,
                kernels=kernels,  # type: ignore[arg-type]
            ),
            AdaptersConfig(slots=sizes.adapters + 8, max_rank=sizes.rank, max_bytes=1 << 32),
        ),
        base,
    )


def prompts(local: LocalEngine, count: int, tokens: int, turn: int) -> list[list[int]]:
    """New ones each turn."""
    rng = random.Random(f"{tokens} {turn}")
    most = local.base.shape.vocab_size
    return [[rng.randrange(4, most) for _ in range(tokens)] for _ in range(count)]


def mixtures(kind: str, count: int) -> list[dict[str, float]]:
    """None, one adapter each, or two each, of as many adapters as there are requests."""
    size = {"none": 0, "distinct": 1, "mixtures": 2}[kind]
    return [{f"a{(i + k) % count}": 1.0 for k in range(size)} for i in range(count)]


@contextmanager
def streams(
    local: LocalEngine, wanted: Sequence[Mapping[str, float]], tokens: int, turn: int
) -> Iterator[list[str]]:
    """Requests that decode, all of them, and are aborted at the end; their ids."""
    sampling = SamplingParams(max_tokens=1 << 20, ignore_eos=True)
    asked = prompts(local, len(wanted), tokens, turn)
    requests = [local.request((p, m, sampling)) for p, m in zip(asked, wanted, strict=True)]
    for request in requests:
        local.engine.submit(request)
    started: set[str] = set()
    while len(started) < len(requests):
        started |= {e.request_id for e in local.step() if isinstance(e, Event) and e.tokens}
    try:
        yield [r.id for r in requests]
    finally:
        for request in requests:
            local.engine.abort(request.id)
        local.step()


def decode_steps(local: LocalEngine, sizes: Sizes, bandwidth: float) -> list[dict[str, Any]]:
    """Every case that fits: seconds of a step, of its forward, and of its bytes."""
    rows = []
    for turn, (count, kind) in enumerate(CASES):
        if count > sizes.requests:
            continue
        wanted = mixtures(kind, count)
        with streams(local, wanted, sizes.prompt, turn):
            warm, timed = sizes.steps // 4 + 1, sizes.steps
            with forward_times(local) as forwards:
                steps = [step_seconds(local, count) for _ in range(warm + timed)]
        middle = sizes.prompt + warm + timed // 2
        parts = step_bytes(local, wanted, middle, sizes.rank)
        step, floor = statistics.median(steps[warm:]), sum(parts.values()) / bandwidth
        row: dict[str, Any] = {
            "requests": count,
            "adapters": kind,
            "step_seconds": step,
            "forward_seconds": statistics.median(forwards[-timed:]),
            "slowest_seconds": max(steps[warm:]),
            "bytes": parts,
            "floor_seconds": floor,
            "over_floor": step / floor,
            "tokens_per_second": count / step,
        }
        log(f"{count} {kind}: {1e3 * step:.2f} ms, {step / floor:.2f} x floor")
        rows.append(row)
    return rows


def step_seconds(local: LocalEngine, tokens: int) -> float:
    """One step that must give so many tokens. RuntimeError where it does not."""
    start = time.perf_counter()
    events = local.engine.step()
    took = time.perf_counter() - start
    given = sum(len(e.tokens) for e in events if isinstance(e, Event))
    if given != tokens:
        raise RuntimeError(f"a step gave {given} tokens instead of {tokens}")
    return took


@contextmanager
def forward_times(local: LocalEngine) -> Iterator[list[float]]:
    """Seconds of each run of the runner meanwhile."""
    runner = local.engine.runner
    run = runner.run
    times: list[float] = []

    def timed(batch: Any) -> Any:
        start = time.perf_counter()
        out = run(batch)
        times.append(time.perf_counter() - start)
        return out

    runner.run = timed  # type: ignore[method-assign]
    try:
        yield times
    finally:
        del runner.run


def step_bytes(
    local: LocalEngine, wanted: Sequence[Mapping[str, float]], context: int, rank: int
) -> dict[str, int]:
    """Bytes that a decode step must read: each weight and adapter in use once, each row's keys."""
    decoder, shape = local.base.decoder, local.base.shape
    size = decoder.dtype.itemsize
    adapter = sum(sum(shape.projection(p)) for p in PROJECTIONS) * shape.layers * rank * size
    token = 2 * shape.layers * shape.kv_heads * shape.head_dim * size
    return {
        "4-bit weights": local.base.linear_bytes,
        "head": decoder.head.nbytes,
        "adapters": adapter * len({name for mixture in wanted for name in mixture}),
        "keys and values": token * context * len(wanted),
    }


def first_tokens(local: LocalEngine, sizes: Sizes) -> list[dict[str, Any]]:
    """Seconds from a long prompt's arrival to its first token, beside 1 stream and beside many."""
    rows = []
    for count in dict.fromkeys((1, sizes.streams)):
        times = []
        with streams(local, mixtures("distinct", count), sizes.prompt, 100 + count):
            for turn in range(sizes.repeat + 1):
                (prompt,) = prompts(local, 1, sizes.long_prompt, 1000 * count + turn)
                request = local.request((prompt, {"a0": 1.0}, SamplingParams(1, ignore_eos=True)))
                start = time.perf_counter()
                local.engine.submit(request)
                while not any(
                    isinstance(e, Event) and e.request_id == request.id and e.tokens
                    for e in local.step()
                ):
                    pass
                times.append(time.perf_counter() - start)
        times = times[1:] or times  # the first compiles
        rows.append(
            {
                "streams": count,
                "prompt": sizes.long_prompt,
                "first_token_seconds": statistics.median(times),
                "slowest_seconds": max(times),
            }
        )
        log(f"first token beside {count}: {1e3 * statistics.median(times):.1f} ms")
    return rows


def loads_beside_streams(local: LocalEngine, sizes: Sizes) -> dict[str, Any]:
    """Times between the tokens of running streams, while nothing loads and while adapters do.

    Adapters are pinned and unpinned, one after another, in the slots that no stream holds, more of
    them than fit: so a load is always under way, and the streams' own work stays the same. Turns of
    both alternate.
    """
    count = sizes.requests
    left_over = local.engine.pool.slots.slots - count
    more = itertools.cycle(add_adapters(local, left_over + 4, sizes.rank, "load-"))
    quiet: list[float] = []
    loading: list[float] = []
    loads: list[float] = []
    with streams(local, mixtures("distinct", count), sizes.prompt, 200):
        for turn in range(2 * sizes.load_turns):
            busy, pinned, before = turn % 2 == 1, "", len(loads)
            gaps = loading if busy else quiet
            last = start = time.perf_counter()
            while (
                last - start < sizes.load_seconds
                or last == start
                or (busy and len(loads) == before)
            ):
                if busy and not pinned:
                    pinned = local.digests[next(more)]
                    local.engine.pin(pinned)
                events = local.engine.step()
                if len(local.engine.scheduler.running) != count:
                    raise RuntimeError("a stream ended while adapters were to load beside it")
                now = time.perf_counter()
                gaps.append(now - last)
                last = now
                for load in (e for e in events if isinstance(e, AdapterLoad)):
                    if load.error is not None:
                        raise load.error.error()
                    loads.append(load.seconds)
                    local.engine.unpin(pinned)
                    pinned = ""
            if pinned:
                local.engine.unpin(pinned)
            while local.engine.pool.loading:
                local.step()
    result: dict[str, Any] = {
        "streams": count,
        "loads": len(loads),
        "load_seconds": statistics.median(loads) if loads else 0.0,
        "quiet_p50_seconds": percentile(quiet, 0.5),
        "quiet_p99_seconds": percentile(quiet, 0.99),
        "loading_p50_seconds": percentile(loading, 0.5),
        "loading_p99_seconds": percentile(loading, 0.99),
        "steps": {"quiet": len(quiet), "loading": len(loading)},
    }
    result["p99_ratio"] = result["loading_p99_seconds"] / result["quiet_p99_seconds"]
    log(f"{len(loads)} loads: p99 {result['p99_ratio']:.2f} x quiet")
    return result


def percentile(times: Sequence[float], share: float) -> float:
    """The smallest time that so many do not exceed."""
    return sorted(times)[max(0, math.ceil(share * len(times)) - 1)]


def memory(device: torch.device) -> dict[str, int]:
    """Bytes that torch has of the card, now and at most; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "most_allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
    }
