"""`mora-serve plan` beside what a server really takes: a base, slots and pages, on the CPU.

A random Llama of 100M parameters (or another size by flags) is planned for on a card of 768 MiB and
loaded as a server loads it, with the settings of the plan, on both of a CPU's paths. What the plan
says of each part is compared with the bytes of the tensors, and their sum with the memory that the
process took, every page of it written. CUDA's own share and a step's scratch are not measured here.

    python -m benchmarks.serving_plan --json
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import memory, report
from benchmarks.local import LocalEngine
from mora_serve.config import AdaptersConfig, BaseConfig, Config, EngineConfig
from mora_serve.model.files import read_shape
from mora_serve.plan import Wanted, plan

MEASURED = (
    "linear weights",
    "embedding and head",
    "norms, biases, rope tables",
    "adapter slots",
)
SMALL = 256, 448, 2, 512
CARD = 768 << 20
WANTED = Wanted(card=CARD, slots=16, rank=16, context=1024, requests=4, cuda=False)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32000)
    args = parser.parse_args()
    sizes = args.hidden, args.intermediate, args.layers, args.vocabulary
    with tempfile.TemporaryDirectory() as folder:
        small, base = Path(folder, "small"), Path(folder, "base")
        for directory, config in ((small, SMALL), (base, sizes)):
            directory.mkdir()
            memory.write_model(directory, memory.llama_config(*config))
        measure(small, "auto", "nf4")  # what is imported and built once is no base's memory
        runs = [
            measure(base, kernels, quantization)
            for kernels in ("auto", "torch")
            for quantization in ("nf4", "none")
        ]
    report.emit(
        {
            "off": max(r["off"] for r in runs),
            "off_by_part": max(r["off_by_part"] for r in runs),
            "off_resident": max(r["off_resident"] for r in runs),
            "runs": runs,
            "environment": report.environment(),
        }
    )


def measure(
    directory: Path, kernels: Any, quantization: Any, wanted: Wanted = WANTED
) -> dict[str, Any]:
    """A plan, and a server with the settings that it gives: its tensors, and its memory."""
    planned = plan(read_shape(str(directory)), replace(wanted, quantization=quantization))
    memory.give_back()
    before = memory.anonymous_bytes()
    config = Config(
        BaseConfig(str(directory), quantization=quantization, dtype="bf16", device="cpu"),
        EngineConfig(
            kernels=kernels,
            kv_bytes=planned.pages * planned.page_bytes,
            max_context=planned.context,
            threads=1,
        ),
        AdaptersConfig(
            slots=wanted.slots,
            max_rank=wanted.rank,
            dtype=wanted.adapter_dtype,
            host_bytes=0,
        ),
    )
    with LocalEngine(config) as engine:
        made = tensors(engine)
        memory.give_back()
        resident = memory.anonymous_bytes() - before
    said = {name: planned.parts[name] for name in MEASURED}
    said["keys and values"] = (planned.pages + 1) * planned.page_bytes
    total = sum(said.values())
    return {
        "kernels": kernels,
        "quantization": quantization,
        "planned": said,
        "tensors": made,
        "resident_bytes": resident,
        "off": abs(total / sum(made.values()) - 1),
        "off_by_part": max(abs(said[name] / made[name] - 1) for name in said),
        "off_resident": abs(total / resident - 1),
    }


def tensors(engine: LocalEngine) -> dict[str, int]:
    """Bytes of what a server keeps, each tensor written once, so that it is in memory."""
    decoder, runner = engine.base.decoder, engine.engine.runner
    for part in runner.pool.slots.parts():
        for tensor in part.tensors:
            tensor.zero_()
    runner.kv.k.zero_()
    runner.kv.v.zero_()
    tables = {id(w): w.nbytes for w in (decoder.embedding, decoder.head)}
    return {
        "linear weights": engine.base.linear_bytes,
        "embedding and head": sum(tables.values()),
        "norms, biases, rope tables": memory.unquantised_bytes(decoder) - sum(tables.values()),
        "adapter slots": runner.pool.slots.nbytes,
        "keys and values": runner.kv.k.nbytes + runner.kv.v.nbytes,
    }


if __name__ == "__main__":
    main()
