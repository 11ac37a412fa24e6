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
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import gpu_carry
from benchmarks.report import ROOT, emit, environment, log

PARTS = (
    *("card", "steps", "first", "loads", "peft"),
    *("products", "kernels", "groups", "demo", "tests"),
)
TESTS = (
    *("tests/test_gpu.py", "tests/model/kernels", "tests/model/test_packed.py"),
    *("tests/engine/test_cuda_forward.py", "tests/engine/test_adapter_pool.py"),
)
TEST_SECONDS = KERNEL_SECONDS = GROUP_SECONDS = 150.0
DEMO_SECONDS = 300.0
GROUP_BASES = ("gptq-act-order", "awq")  # of benchmarks.group_bases, which takes longer for all
TEST_CORES = 8  # from which on tests run side by side: compiling takes most of their time
# What parts import, as far as an image for cards may lack it, and the packages that have it
NEEDED = {
    "bitsandbytes": "bitsandbytes",
    "google.rpc": "googleapis-common-protos",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "grpc_status": "grpcio-status",
    "hypothesis": "hypothesis",
    "peft": "peft",
    "pytest": "pytest",
    "pytest_asyncio": "pytest-asyncio",
    "pytest_timeout": "pytest-timeout",
}
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
        self._local: Any = None
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
        """Stop the engine."""
        self._opened.close()

    @property
    def local(self) -> Any:
        """The engine on the random base, with its adapters resident."""
        if self._local is None:
            from benchmarks import gpu_base, gpu_steps

            start = time.monotonic()
            base = gpu_base.random_base(self._shape, self.device, self.dtype)
            kernels = "triton" if self.small else "auto"
            local = gpu_steps.make_engine(base, self.sizes, str(self.device), kernels)
            self._opened.enter_context(local)
            forward = local.engine.runner.forward
            self.result["kernels_used"] = type(forward).__name__
            self.result["early_launches"] = getattr(forward, "early_launches", None)
            local.engine.warm_up()
            names = gpu_base.add_adapters(local, self.sizes.adapters, self.sizes.rank)
            local.make_resident(names)
            local.engine.pool.drop(tuple(local.digests[name] for name in names))
            self._local = local
            self.result["ready_seconds"] = time.monotonic() - start
            self.result["memory"] = gpu_steps.memory(self.device)
            product = getattr(forward, "product", None)
            self.result["four_bit_products"] = [
                {"kind": form.kind, "out": form.out, "in": form.columns, "by_rows": by_rows}
                for form, by_rows in (product.table if product else {}).items()
            ]
        return self._local

    @property
    def bandwidth(self) -> float:
        """Bytes a second of a copy, measured in this run."""
        if "copy_bytes_per_second" not in self.result.get("card", {}):
            self.run("card")
        return float(self.result["card"]["copy_bytes_per_second"])

    def card(self) -> dict[str, Any]:
        """Its rates."""
        from benchmarks import gpu_card

        if self.small:
            return gpu_card.rates(self.device, 1 << 20, 64)
        return gpu_card.rates(self.device)

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

        rows, tokens = self.sizes.streams, 2 if self.small else 8
        return gpu_peft.measure(self.local.base, rows, self.sizes.rank, self.sizes.prompt, tokens)

    def kernels(self) -> dict[str, Any]:
        """The adapter product beside its peers', in a process of its own."""
        flags = ["--interpret"] if self.small else ["--fetch"]
        return _json_of("benchmarks.gpu_kernels", flags, self.left(KERNEL_SECONDS))

    def products(self) -> dict[str, Any]:
        """4-bit products by every way."""
        from benchmarks import gpu_card, gpu_products
        from mora_serve.model.kernels.products import card_seconds

        sizes = self._shape, self.device, self.dtype, self.bandwidth
        if not self.small:
            return gpu_products.measure(*sizes, card_seconds)

        def seconds(work: Callable[[], object]) -> float:
            return gpu_card.seconds(work, self.device, 1)

        return gpu_products.measure(*sizes, seconds, (1,), ("o",), 1)

    def groups(self) -> dict[str, Any]:
        """GPTQ and AWQ, in a process of its own."""
        flags = ["--json", "--device", str(self.device), "--only", *GROUP_BASES, "--tokens"]
        seconds = self.left(GROUP_SECONDS)
        return _json_of("benchmarks.group_bases", [*flags, "2" if self.small else "12"], seconds)

    def demo(self) -> dict[str, Any]:
        """The demo's answers."""
        from benchmarks import gpu_demo

        most, seconds = 4 if self.small else 1000, self.left(DEMO_SECONDS)
        return gpu_demo.measure(str(self.device), most, seconds)

    def tests(self) -> dict[str, Any]:
        """The tests that use a card where there is one."""
        paths = ("tests/model/test_packed.py",) if self.small else TESTS
        return run_tests(paths, self.left(TEST_SECONDS))


def _json_of(module: str, flags: Sequence[str], timeout: float) -> dict[str, Any]:
    """The JSON that a measurement of its own prints. RuntimeError where it prints none."""
    command = [sys.executable, "-m", module, *flags]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=timeout, check=False
    )
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise RuntimeError(f"{module} ended with status {done.returncode}, no result") from None
    return found


def run_tests(paths: Sequence[str], timeout: float = TEST_SECONDS) -> dict[str, Any]:
    """Run pytest on ``paths``; returns counts, seconds and the failed tests' names."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors"]
        if find_spec("xdist") and (os.cpu_count() or 1) >= TEST_CORES:
            command += ["-n", str(TEST_CORES)]
        command += [f"--junitxml={report}", *paths]
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


def missing() -> list[str]:
    """The packages that parts need and that are not here."""

    def there(module: str) -> bool:
        try:
            return find_spec(module) is not None
        except ImportError:  # of the package that it is in
            return False

    return [package for module, package in NEEDED.items() if not there(module)]


def figures(result: Mapping[str, Any]) -> dict[str, float]:
    """What the claims name, as far as it was measured."""
    found: dict[str, float] = {}

    def note(name: str, work: Callable[[], float]) -> None:
        with suppress(KeyError, TypeError, IndexError):  # its part failed, or was not asked for
            found[name] = work()

    def step(count: int, kind: str) -> Mapping[str, Any]:
        rows = [r for r in result["steps"] if (r["requests"], r["adapters"]) == (count, kind)]
        return rows[0]  # type: ignore[no-any-return]

    for count in (1, 16, 64):
        note(f"step_{count}_over_floor", lambda n=count: step(n, "distinct")["over_floor"])  # type: ignore[misc]
    note("step_1_base_over_floor", lambda: step(1, "none")["over_floor"])
    for kind in ("distinct", "mixtures"):
        note(
            f"{kind}_32_over_none",
            lambda k=kind: step(32, k)["tokens_per_second"] / step(32, "none")["tokens_per_second"],  # type: ignore[misc]
        )
    note(
        "over_peft",
        lambda: step(32, "distinct")["tokens_per_second"] / result["peft"]["tokens_per_second"],
    )
    note("peft_logits_error", lambda: result["peft"]["logits_error"])
    for row in result["first"] if isinstance(result.get("first"), list) else ():
        found[f"first_token_ms_{row['streams']}"] = 1e3 * row["first_token_seconds"]
    note("loading_p99_over_quiet", lambda: result["loads"]["p99_ratio"])
    for part in ("products", "kernels"):
        for name in ("within_rounding", "repeats"):
            note(f"{part}_{name}", lambda p=part, n=name: result[p][n])  # type: ignore[misc]
    note("times_faster_than_peers", lambda: result["kernels"]["least_times_faster"])
    for name in ("gptq_logits", "awq_logits"):
        note(name, lambda n=name: result["groups"][n])  # type: ignore[misc]
    note("groups_wrong_tokens", lambda: result["groups"]["wrong_tokens"])
    note("demo_wrong", lambda: result["demo"]["wrong"] + result["demo"]["other_mixtures"])
    note("tests_failed", lambda: result["tests"]["failures"] + result["tests"]["errors"])
    note("tests_status", lambda: result["tests"]["status"])
    return found


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
