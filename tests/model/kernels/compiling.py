"""Compile Triton kernels for cards that are not here, down to ptxas.

The interpreter takes more than the compiler does, and a process that interprets kernels cannot
compile them. So ``compiled`` starts another one, which compiles for the architectures asked for;
no card or driver is needed.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
# Shared memory that one block may ask for, in bytes, from the CUDA programming guide.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel.

    ``kernel`` is "package.module:name". ``arguments`` gives the type of each argument that is not
    in ``constants``, as Triton writes it ("*bf16", "i32"); pointers are taken as aligned to 16
    bytes, and the integers in ``aligned`` as multiples of 16, as Triton does when it sees such a
    value. A constant "tl.float32" stands for that Triton type. ``options`` are the compiler's
    (num_warps, num_stages).
    """

    name: str
    kernel: str
    arguments: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, int] = field(default_factory=dict)
    aligned: Sequence[str] = ()


@dataclass(frozen=True)
class Compiled:
    """What came of a case on one architecture; ``error`` is empty if it compiled."""

    error: str = ""
    registers: int = 0  # of a thread
    stack: int = 0  # bytes of a thread in local memory: what did not fit in registers
    shared: int = 0  # bytes of a block
    tensor_cores: bool = False


def compiled(
    cases: Sequence[Case], architectures: Sequence[int] = (80, 90)
) -> dict[tuple[str, int], Compiled]:
    """Compile every case for every architecture (80 is sm_80): by (name, architecture)."""
    request = {"cases": [asdict(case) for case in cases], "architectures": list(architectures)}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "tests.model.kernels.compiling"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
            cwd=ROOT,
            env={**environment, "TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)},
        )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    return {(row["name"], row["architecture"]): Compiled(**row["result"]) for row in rows}


def _compile(case: Case, architecture: int) -> Compiled:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = case.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    constants = {
        key: getattr(tl, value[3:]) if isinstance(value, str) and value[:3] == "tl." else value
        for key, value in case.constants.items()
    }
    signature = {n: "constexpr" if n in constants else case.arguments[n] for n in kernel.arg_names}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, n in enumerate(kernel.arg_names)
        if signature[n].startswith("*") or n in case.aligned
    }
    source = ASTSource(kernel, signature, constants, attributes)
    try:
        result = triton.compile(
            source, target=GPUTarget("cuda", architecture, 32), options=dict(case.options)
        )
    except Exception as error:
        cause = error.__cause__ or error.__context__
        return Compiled(error=f"{type(error).__name__}: {error}" + (f" ({cause})" if cause else ""))
    usage = _usage(result.asm["cubin"])
    return Compiled(
        registers=usage["REG"],
        stack=usage["STACK"],
        shared=result.metadata.shared,
        tensor_cores="mma" in result.asm["ptx"],
    )


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
    rows = [
        {
            "name": case["name"],
            "architecture": architecture,
            "result": asdict(_compile(Case(**case), architecture)),
        }
        for case in request["cases"]
        for architecture in request["architectures"]
    ]
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
