"""Compile Triton kernels for cards that are not here, down to ptxas.

The interpreter takes more than the compiler does, and a process that interprets kernels cannot
compile them. So ``compiled`` starts another process, which calls functions that launch kernels on
tensors of the device "meta": each launch is specialised by Triton as on a card, compiled, and not
run. No card or driver is needed.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
# Shared memory that one block may ask for, in bytes, from the CUDA programming guide.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}


@dataclass(frozen=True)
class Compiled:
    """One kernel as one launch compiled it; ``error`` is empty if that went well."""

    kernel: str
    error: str = ""
    registers: int = 0  # of a thread
    stack: int = 0  # bytes of a thread in local memory: what did not fit in registers
    shared: int = 0  # bytes of a block
    tensor_cores: bool = False
    binary: str = ""  # equal for launches that need one compilation


def compiled(
    module: str,
    cases: Sequence[str] | Mapping[str, Sequence[int]],
    architectures: Sequence[int] = (80, 90),
) -> dict[tuple[str, int], list[Compiled]]:
    """By (case, architecture), the kernels that the case launches, in their order.

    ``module`` has a dictionary ``LAUNCHES`` of functions without arguments, by the cases' names.
    Architecture 80 is sm_80; ``cases`` may give each case's own.
    """
    wanted = cases if isinstance(cases, Mapping) else dict.fromkeys(cases, architectures)
    request = {"module": module, "cases": {case: list(each) for case, each in wanted.items()}}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": _cache().name, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.kernels.compiling"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return {
        (row["case"], row["architecture"]): [Compiled(**kernel) for kernel in row["kernels"]]
        for row in json.loads(done.stdout)
    }


@functools.cache
def _cache() -> tempfile.TemporaryDirectory[str]:
    """Of this process's tests, empty at first: modules share many a launch."""
    return tempfile.TemporaryDirectory()


class _Absent:
    """The driver of a card that is not here."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)  # Triton's caches are by device

    def get_current_stream(self, device: int) -> int:
        return 0


def _launched(launch: Any, architecture: int) -> list[Compiled]:
    import triton
    from triton.runtime.jit import JITFunction

    found: list[Compiled] = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        assert all(1 <= size < 1 << 31 for size in grid), grid
        try:
            result = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:
            cause = error.__cause__ or error.__context__
            text = f"{type(error).__name__}: {error} ({cause})"
            found.append(Compiled(kernel.__name__, text))
            return None
        usage = _usage(result.asm["cubin"])
        shared, ptx = result.metadata.shared, result.asm["ptx"]
        found.append(
            Compiled(
                kernel.__name__,
                *("", usage["REG"], usage["STACK"], shared, "mma" in ptx),
                result.hash,
            )
        )
        return result

    triton.runtime.driver.set_active(_Absent(architecture))
    JITFunction.run = compile_only
    try:
        launch()
    finally:
        JITFunction.run = run
    return found


@functools.cache
def _usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and more, as cuobjdump of Triton's wheel reports them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", text)}


def main() -> None:
    """Read a request as JSON from standard input, write the results to standard output."""
    request = json.load(sys.stdin)
    launches = importlib.import_module(request["module"]).LAUNCHES
    rows = [
        {
            "case": case,
            "architecture": architecture,
            "kernels": [asdict(kernel) for kernel in _launched(launches[case], architecture)],
        }
        for case, architectures in request["cases"].items()
        for architecture in architectures
    ]
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
