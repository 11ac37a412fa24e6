"""The package as its users install it: built, installed in an empty environment, the demo run.

Copies what git tracks, builds the source distribution and from it the wheel, makes an environment
elsewhere, installs ``mora-serve[train,http]`` from the wheel there with the tested versions, and
runs ``mora-serve demo`` outside the repository. Needs git, a C compiler and a package index; takes
some minutes, and 3 GB of disk meanwhile.

    python -m benchmarks.wheel --json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks import report

CONSTRAINTS = report.ROOT / "constraints.txt"
STEP_SECONDS = 420  # of the longest step, the installation, on a busy machine

IN_WHEEL = (
    "mora_serve/py.typed",
    "mora_serve/demo/bundle/bundle.json",
    "mora_serve/demo/bundle/base/model.safetensors",
    "mora_serve/v1/generation_pb2.pyi",
    "router_training/__main__.py",
)
IN_SOURCES = (
    *IN_WHEEL,
    "proto/buf.yaml",
    "proto/buf.gen.yaml",
    "proto/mora_serve/v1/generation.proto",
    "mora_serve/model/native/library.c",
    "mora_serve/model/native/product.h",
    "mora_serve/router/native.c",
    "constraints.txt",
    "LICENSE",
)


class Step(Protocol):
    """Runs one command, whose name and seconds are reported; gives what it prints."""

    def __call__(self, name: str, command: Sequence[object], cwd: Path = ...) -> str: ...


# Run by the new environment: what it has imported comes from there, and typed.
LOOK = """
import importlib.metadata, json, pathlib, sys
import mora_serve, router_training, fastapi, trl
from mora_serve.model.native.library import targets

import torch
where = pathlib.Path(mora_serve.__file__)
print(json.dumps({
    "inside": str(where).startswith(sys.prefix),
    "typed": (where.parent / "py.typed").exists(),
    "compiled": bool(targets(torch.float32)),
    "version": importlib.metadata.version("mora-serve"),
}))
"""


def main() -> None:
    """Build, install, run, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mora-wheel-") as folder:
        report.emit({**measure(Path(folder)), "environment": report.environment()})


def measure(folder: Path) -> dict[str, Any]:
    """What is missing in the files, what the new environment says, and seconds a step."""
    seconds: dict[str, float] = {}

    def step(name: str, command: Sequence[object], cwd: Path = folder) -> str:
        report.log(f"{name} ...")
        start = time.monotonic()
        out = _run(command, cwd)
        seconds[name] = round(time.monotonic() - start, 1)
        return out

    sources, wheel = build(folder, step)
    start = time.monotonic()
    venv.create(folder / "env", with_pip=True)
    seconds["environment"] = round(time.monotonic() - start, 1)
    python = folder / "env" / "bin" / "python"
    step("install", [python, *PIP, "install", "-c", CONSTRAINTS, f"{wheel}[train,http]"])
    looked = json.loads(step("import", [python, "-c", LOOK]))
    demo = json.loads(step("demo", [folder / "env/bin/mora-serve", "demo", "--json"]))
    missing = [*missing_sources(sources), *missing_wheel(wheel)]
    return {
        "missing": missing,
        "wheel_bytes": wheel.stat().st_size,
        "sources_bytes": sources.stat().st_size,
        **looked,
        "demo_ok": demo["ok"],
        "ok": demo["ok"] and looked["inside"] and looked["typed"] and not missing,
        "seconds": seconds,
    }


PIP = ("-m", "pip", "--no-input", "--disable-pip-version-check", "-q")


def build(folder: Path, step: Step) -> tuple[Path, Path]:
    """The source distribution of what git tracks, and the wheel that is made of it."""
    step("build tools", [sys.executable, "-m", "venv", "--without-pip", folder / "tools"])
    tools = folder / "tools" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", tools, *PIP[2:]]
    step("setuptools", [*pip, "install", "-c", CONSTRAINTS, "setuptools"])
    sources = source_distribution(folder / "tree", tools, step)
    flags = ["--no-deps", "--no-build-isolation", "-w", folder / "wheels"]
    step("wheel", [*pip, "wheel", *flags, sources])
    (wheel,) = (folder / "wheels").glob("mora_serve-*.whl")
    return sources, wheel


def source_distribution(tree: Path, python: Path, step: Step) -> Path:
    """A copy of what git tracks, in ``tree``, and the source distribution that is made of it.

    ``python`` is an interpreter that has setuptools.
    """
    listed = _run(["git", "ls-files", "-z"], report.ROOT)
    for name in filter(None, listed.split("\0")):
        if (report.ROOT / name).is_file():  # or it is being removed
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((report.ROOT / name).read_bytes())
    made = "from setuptools import build_meta as b; print(b.build_sdist('dist'))"
    name = step("sources", [python, "-c", made], tree).splitlines()[-1]
    return tree / "dist" / name


def missing_sources(sources: Path) -> list[str]:
    """What a source distribution should have and has not."""
    with tarfile.open(sources) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    return [name for name in IN_SOURCES if name not in inside]


def missing_wheel(wheel: Path) -> list[str]:
    """What a wheel should have and has not."""
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    return [name for name in IN_WHEEL if name not in inside]


def _run(command: Sequence[object], cwd: Path) -> str:
    leave_out = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
    environ = {k: v for k, v in os.environ.items() if k not in leave_out}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=sys.stderr,
        text=True,
        timeout=STEP_SECONDS,
        check=True,
    )
    return done.stdout


if __name__ == "__main__":
    main()
