"""The whole measurement on a machine with a card, in one run of under ten minutes.

    python -m benchmarks.gpu                      all parts
    python -m benchmarks.gpu --parts card steps   some of them
    python -m benchmarks.gpu --interpret          each part in small on the CPU: nothing is measured

Parts: the GPU tests (tests); the card's rates (card); on a base of the Llama-3.1-8B shape with
random NF4 weights and rank-16 adapters on all projections, decode steps beside the time of their
bytes (steps), first tokens of long prompts (first), tokens of running streams while adapters load
(loads) and PEFT's mixed batch on the same weights (peft); 4-bit products by every way (products);
the adapter product beside those of vLLM and SGLang (kernels); bases in GPTQ and AWQ beside
transformers (groups); the demo's answers beside the CPU's (demo). What fails is recorded as failed
and does not stop the rest; a part that would begin after ``--minutes`` is left out, and one that
runs in other processes ends with them SPARE seconds later. ``--out`` has what was measured so far
after each part. Exits with 2 where torch sees no CUDA device.

Nothing is downloaded but the peers' kernels, where there is a network. For a machine without one
benchmarks.gpu_carry makes a folder of what is missing there.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import gpu_carry
from benchmarks.gpu_figures import figures
from benchmarks.gpu_processes import json_of, missing, run_tests
from benchmarks.report import emit, environment, log

PARTS = (
    *("card", "steps", "first", "loads", "peft"),
    *("products", "kernels", "groups", "demo", "tests"),
)
TESTS = (
    *("tests/test_gpu.py", "tests/model/kernels", "tests/model/test_packed.py"),
    *("tests/engine/test_cuda_forward.py", "tests/engine/test_adapter_pool.py"),
    "tests/engine/test_graphs.py",
)
TEST_SECONDS = KERNEL_SECONDS = GROUP_SECONDS = 150.0
DEMO_SECONDS = 300.0
GROUP_BASES = ("gptq-act-order", "awq")  # of benchmarks.group_bases, which takes longer for all
SPARE = 90.0  # seconds that a part which began in time may still take


class Measurement:
    """Runs parts; what several of them need is made once.

    Processes that a part starts end at ``until``, on the monotonic clock.
    """

    def __init__(self, device: str, until: float = math.inf) -> None:
        import torch

        from benchmarks import gpu_base, gpu_steps

        self.until = until
        self.device = torch.device(device)
        self.small = device == "cpu"
        self.dtype = torch.float32 if self.small else torch.bfloat16
        self.sizes = gpu_steps.TINY if self.small else gpu_steps.Sizes()
        self.result: dict[str, Any] = {}
        self._shape = gpu_base.TINY if self.small else gpu_base.LLAMA
        self._base: Any = None
        self._local: Any = None
        self._why_not = ""  # there is an engine
        self._opened = ExitStack()

    def run(self, name: str) -> None:
        """One part; an exception is its result."""
        start = time.monotonic()
        log(f"{name} ...")
        try:
            found = getattr(self, name)()
            json.dumps(found, allow_nan=False)  # a number that is none shall not cost the others
        except Exception as e:
            log(f"{name} failed: {type(e).__name__}: {e}")
            found = {"error": f"{type(e).__name__}: {e}"[:500]}
        self.result[name] = found
        self.result.setdefault("seconds_by_part", {})[name] = time.monotonic() - start

    def left(self, most: float) -> float:
        """Seconds that a part's processes may take, ``most`` where there is time for it."""
        return max(1.0, min(most, self.until - time.monotonic()))

    def close(self) -> None:
        """Stop the engine, and leave its memory to others."""
        self._opened.close()
        self._local = None
        self.give_back()

    def give_back(self) -> None:
        """What nothing refers to any more, to the card: other processes need it."""
        import torch

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def base(self) -> Any:
        """The random base."""
        if self._base is None:
            from benchmarks import gpu_base

            self._base = gpu_base.random_base(self._shape, self.device, self.dtype)
        return self._base

    @property
    def local(self) -> Any:
        """The engine on the random base, with its adapters resident; is tried once."""
        if self._why_not:
            raise RuntimeError(self._why_not)
        if self._local is None:
            try:
                self._local = self._started()
            except Exception as e:
                self._why_not = f"no engine: {type(e).__name__}: {e}"
                raise
        return self._local

    def _started(self) -> Any:
        from benchmarks import gpu_base, gpu_steps

        start = time.monotonic()
        kernels = "triton" if self.small else "auto"
        local = gpu_steps.make_engine(self.base, self.sizes, str(self.device), kernels)
        self._opened.enter_context(local)
        forward = local.engine.runner.forward
        self.result["kernels_used"] = type(forward).__name__
        step = getattr(forward, "step", None)
        self.result["early_launches"] = getattr(step, "early_launches", None)
        local.engine.warm_up()
        names = gpu_base.add_adapters(local, self.sizes.adapters, self.sizes.rank)
        local.make_resident(names)
        local.engine.pool.drop(tuple(local.digests[name] for name in names))
        self.result["ready_seconds"] = time.monotonic() - start
        self.result["memory"] = gpu_steps.memory(self.device)
        self.result["not_captured"] = sorted(map(str, getattr(forward, "eager", ())))
        product = getattr(step, "product", None)
        self.result["four_bit_products"] = [
            {"kind": form.kind, "out": form.out, "in": form.columns, "by_rows": by_rows}
            for form, by_rows in (product.table if product else {}).items()
        ]
        return local

    @property
    def bandwidth(self) -> float:
        """Bytes a second of a copy, measured in this run."""
        if "copy_bytes_per_second" not in self.result.get("card", {}):
            self.run("card")
        return float(self.result["card"]["copy_bytes_per_second"])

    def _make_room(self) -> None:
        """No engine and no base: they take nearly all of a card's memory."""
        self._base = None
        self.close()

    def card(self) -> dict[str, Any]:
        """Its rates."""
        from benchmarks import gpu_card

        sizes = (1 << 20, 64) if self.small else ()
        found = gpu_card.rates(self.device, *sizes)
        self.give_back()
        return found

    def steps(self) -> list[dict[str, Any]]:
        """Decode steps beside their floors."""
        from benchmarks import gpu_steps

        return gpu_steps.decode_steps(self.local, self.sizes, self.bandwidth)

    def first(self) -> list[dict[str, Any]]:
        """First tokens."""
        from benchmarks import gpu_steps

        return gpu_steps.first_tokens(self.local, self.sizes)

    def loads(self) -> dict[str, Any]:
        """Streams while adapters load."""
        from benchmarks import gpu_steps

        return gpu_steps.loads_beside_streams(self.local, self.sizes)

    def peft(self) -> dict[str, Any]:
        """PEFT's mixed batch, as many rows and adapters as there are streams."""
        from benchmarks import gpu_peft

        self.close()
        rows, tokens = self.sizes.streams, 2 if self.small else 8
        return gpu_peft.measure(self.base, rows, self.sizes.rank, self.sizes.prompt, tokens)

    def kernels(self) -> dict[str, Any]:
        """The adapter product beside its peers', in a process of its own."""
        self._make_room()
        flags = ["--interpret"] if self.small else ["--fetch"]
        return json_of("benchmarks.gpu_kernels", flags, self.left(KERNEL_SECONDS))

    def products(self) -> dict[str, Any]:
        """4-bit products by every way."""
        from benchmarks import gpu_card, gpu_products
        from mora_serve.model.kernels.products import card_seconds

        self._make_room()
        sizes = self._shape, self.device, self.dtype, self.bandwidth
        if not self.small:
            return gpu_products.measure(*sizes, card_seconds)

        def seconds(work: Callable[[], object]) -> float:
            return gpu_card.seconds(work, self.device, 1)

        return gpu_products.measure(*sizes, seconds, (1,), ("o",), 1)

    def groups(self) -> dict[str, Any]:
        """GPTQ and AWQ, in a process of its own."""
        self._make_room()
        flags = ["--json", "--device", str(self.device), "--only", *GROUP_BASES, "--tokens"]
        seconds = self.left(GROUP_SECONDS)
        return json_of("benchmarks.group_bases", [*flags, "2" if self.small else "12"], seconds)

    def demo(self) -> dict[str, Any]:
        """The demo's answers."""
        from benchmarks import gpu_demo

        self._make_room()
        most, seconds = 4 if self.small else 1000, self.left(DEMO_SECONDS)
        return gpu_demo.measure(str(self.device), most, seconds)

    def tests(self) -> dict[str, Any]:
        """The tests that use a card where there is one."""
        self._make_room()
        paths = ("tests/model/test_packed.py",) if self.small else TESTS
        return run_tests(paths, self.left(TEST_SECONDS))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--interpret", action="store_true", help="on the CPU, in small")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no part begins")
    parser.add_argument("--out", type=Path, help="write the JSON here too, after each part")
    args = parser.parse_args(argv)
    gpu_carry.use()
    from benchmarks import gpu_card

    if not gpu_card.found(args.interpret):
        return 2
    start = time.monotonic()
    until = start + 60 * args.minutes + SPARE
    measurement = Measurement("cpu" if args.interpret else "cuda", until)
    result = measurement.result
    result |= {**environment(), "interpreted": args.interpret, "missing": missing()}
    if result["missing"]:
        log(f"not installed: {', '.join(result['missing'])}; parts that need them will fail")
    try:
        for name in (p for p in PARTS if p in args.parts):
            if time.monotonic() - start > 60 * args.minutes:
                result[name] = {"error": f"left out: {args.minutes:g} minutes were over"}
                log(f"{name}: {result[name]['error']}")
            else:
                measurement.run(name)
            if args.out is not None:
                args.out.write_text(json.dumps({**result, "figures": figures(result)}) + "\n")
    finally:
        measurement.close()
    result["figures"] = figures(result)
    emit(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
