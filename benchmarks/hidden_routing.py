"""Routing by the base's hidden states beside routing by n-grams: what each costs, and whom.

A real server in this process, asked over gRPC, on a random Llama of 100M parameters (or another
size by flags) in NF4. The router is fitted on the demo's tasks twice: on n-grams, and on n-grams
and the state after a quarter of the layers. Timed are decisions (idle, and while streams run) and
registrations with 16 prompts. For the streams counts the processor time of the engine's thread in
their steps: in all, and without the passes for the router; the ratio of the two is how much slower
they are, while decisions are asked for one after another, and while the keys of all adapters are
made for a new router.

    OMP_NUM_THREADS=1 python -m benchmarks.hidden_routing --json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks import memory, report
from benchmarks.hot_registration import Recorder, longest_gaps, stream
from mora_serve.client import AsyncClient
from mora_serve.config import AdaptersConfig, BaseConfig, Config, EngineConfig, ServerConfig
from mora_serve.core import AdapterLoad, Event
from mora_serve.engine.engine import Engine
from mora_serve.engine.pool_queue import PoolQueue
from mora_serve.model.loading import load_base
from mora_serve.model.pooling import pooled_hidden
from mora_serve.model.shape import PROJECTIONS, ModelShape, projection_path
from mora_serve.router.arrays import Floats
from mora_serve.router.features import Features, NGrams, PooledHidden
from mora_serve.server.app import MoraServer
from router_training.demo.out_of_domain import out_of_domain
from router_training.demo.tasks import TASKS
from router_training.router import FitOptions, fit_router
from router_training.router_data import RouterData

CARD_PROMPTS = 16
ROUTING_STEPS = 10
ADAPTER = "adapter"  # one content; the adapters are names of it


class StepClock:
    """Notes what every step costs; wraps the engine's own step and the passes inside it.

    ``steps`` are (time of its end, processor seconds of the engine's thread, of these in passes
    for the router).
    """

    def __init__(self) -> None:
        self.steps: list[tuple[float, float, float]] = []
        self._step, self._run = Engine.step, PoolQueue.run

    def __enter__(self) -> StepClock:
        step, run = self._step, self._run
        pooling = 0.0

        def timed_run(queue: PoolQueue, busy: bool) -> int:
            nonlocal pooling
            started = time.thread_time()
            cost = run(queue, busy)
            pooling += time.thread_time() - started
            return cost

        def timed_step(engine: Engine) -> list[Event | AdapterLoad]:
            nonlocal pooling
            started, pooling = time.thread_time(), 0.0
            events = step(engine)
            if any(isinstance(e, Event) and e.tokens for e in events):
                self.steps.append((time.monotonic(), time.thread_time() - started, pooling))
            return events

        Engine.step = timed_step  # type: ignore[method-assign,assignment]
        PoolQueue.run = timed_run  # type: ignore[method-assign,assignment]
        return self

    def __exit__(self, *exc: object) -> None:
        Engine.step = self._step  # type: ignore[method-assign]
        PoolQueue.run = self._run  # type: ignore[method-assign]

    def ratio(self, start: float, end: float) -> float:
        """Of the steps that ended in start..end, all of their time to that without pooling."""
        steps = [(cpu, pooling) for now, cpu, pooling in self.steps if start <= now <= end]
        return sum(cpu for cpu, _ in steps) / sum(cpu - pooling for cpu, pooling in steps)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--requests", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "base").mkdir()
        sizes = (args.hidden, args.intermediate, args.layers, args.vocabulary)
        memory.write_model(root / "base", memory.llama_config(*sizes))
        routers = make_routers(root, args.layers // 4)
        figures = asyncio.run(measure(root, routers, args))
    for name, value in figures.items():
        report.log(f"{name:>32} {value:10.3f}")
    report.emit({**figures, "arguments": vars(args), "environment": report.environment()})


def make_routers(root: Path, depth: int) -> dict[str, bytes]:
    """Routers for the base under ``root``, two of them on hidden states; an adapter beside it."""
    base = load_base(BaseConfig(str(root / "base"), device="cpu"))
    write_adapter(root / "adapters" / ADAPTER, base.shape)
    hidden = PooledHidden(depth, base.shape.hidden_size)

    states: dict[str, Floats] = {}

    def pool(texts: Sequence[str]) -> Floats:
        new = [text for text in texts if text not in states]
        made = pooled_hidden(base.decoder, base.tokenizer, new, depth, hidden.max_tokens)
        states.update(zip(new, made, strict=True))
        return np.stack([states[text] for text in texts])

    def fit(features: Features, seed: int = 0) -> bytes:
        report.log(f"fitting a router on {features.kind} ...")
        rng = random.Random(0)
        examples = {name: prompts(name, 1, 20) for name in TASKS}
        outside = [out_of_domain(rng) for _ in range(80)]
        options = FitOptions(features, strengths=(1.0,), blends=(0.33,), folds=2, seed=seed)
        return fit_router(RouterData.of(examples, outside), base.fingerprint, options, pool)[0]

    both = Features(NGrams(), hidden)
    return {"ngrams": fit(Features(NGrams())), "both": fit(both), "new": fit(both, seed=1)}


def write_adapter(directory: Path, shape: ModelShape) -> None:
    """A random adapter of rank 4 on all projections, as PEFT writes it."""
    tensors = {}
    for layer in range(shape.layers):
        for projection in PROJECTIONS:
            rows, columns = shape.projection(projection)
            prefix = f"base_model.model.{projection_path(layer, projection)}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, columns) / 100
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, 4) / 100
    directory.mkdir(parents=True)
    save_file(tensors, str(directory / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(PROJECTIONS)}
    (directory / "adapter_config.json").write_text(json.dumps(config))


async def measure(
    root: Path, routers: dict[str, bytes], args: argparse.Namespace
) -> dict[str, float]:
    """Figures in milliseconds, unless they say otherwise."""
    config = Config(
        BaseConfig(str(root / "base"), device="cpu"),
        EngineConfig(max_tokens=4000),
        AdaptersConfig(root=str(root / "adapters"), slots=4),
        server=ServerConfig(port=0, metrics_port=-1),
    )
    names = sorted(TASKS)
    asked = [prompts(names[i % len(names)], 5 + i, 1)[0] for i in range(args.requests)]
    figures: dict[str, float] = {}
    failures: list[str] = []
    done = asyncio.Event()
    with StepClock() as clock, Recorder() as recorder:
        steps = recorder.steps
        async with MoraServer(config) as server, AsyncClient(server.address, timeout=900) as client:

            async def register(i: int) -> None:
                card = prompts(names[i % len(names)], i, CARD_PROMPTS)
                await client.register_adapter(f"a{i}", ADAPTER, prompts=card)

            for i in range(args.adapters):
                await register(i)
            for kind in ("ngrams", "both"):
                await client.load_router(data=routers[kind])
                figures[f"{kind}_decision_idle"] = await median_ms(client.route, asked)
            tasks = [
                asyncio.create_task(stream(client, i, {}, done, failures))
                for i in range(args.streams)
            ]
            while not failures and (not steps or len(steps[-1][1]) < args.streams):
                await asyncio.sleep(0.05)
            registered = args.adapters
            for kind in ("ngrams", "both"):
                await client.load_router(data=routers[kind])
                begun, first = time.monotonic(), len(steps)
                decisions: list[float] = []
                while len(steps) - first < ROUTING_STEPS or not decisions:
                    decisions.append(await median_ms(client.route, asked[:5]))
                figures[f"{kind}_decision_busy"] = statistics.median(decisions)
                figures[f"{kind}_step_ratio_routing"] = clock.ratio(begun, time.monotonic())
                new = range(registered, registered + 5)
                figures[f"{kind}_registration_busy"] = await median_ms(register, new)
                registered += len(new)
            begun = time.monotonic()
            await client.load_router(data=routers["new"])
            ended = time.monotonic()
            figures["new_router_seconds"] = ended - begun
            figures["adapters_keyed"] = registered
            figures["step_ratio_keying"] = clock.ratio(begun, ended)
            pause = longest_gaps(steps, "stream-", begun, ended)[1]
            figures["longest_pause_while_keying"] = 1e3 * pause
            done.set()
            await asyncio.gather(*tasks)
    if failures:
        raise RuntimeError(failures[0])
    return figures


async def median_ms(work: Callable[[Any], Awaitable[Any]], items: Sequence[Any]) -> float:
    """The median milliseconds of ``work`` on each item, one after another."""
    seconds = []
    for item in items:
        started = time.monotonic()
        await work(item)
        seconds.append(time.monotonic() - started)
    return 1e3 * statistics.median(seconds)


def prompts(task: str, seed: int, count: int) -> list[str]:
    """Prompts of one of the demo's tasks."""
    return [prompt for prompt, _ in TASKS[task].examples(seed, count)]


if __name__ == "__main__":
    main()
