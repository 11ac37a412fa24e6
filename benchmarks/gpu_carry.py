"""What a machine with a card but without a network lacks for the measurement, in one folder.

    python -m benchmarks.gpu_carry
    python -m benchmarks.gpu_carry --python 3.12 --cuda 130

downloads wheels for a Linux machine (x86-64), in the versions of constraints.txt, and unpacks them
into FOLDER, of bitsandbytes only what one CUDA version needs; and the peers' kernels, as
benchmarks.lora_peers does. Take both folders along with the checkout: benchmarks.gpu finds them
there.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.report import ROOT, log

FOLDER = ROOT / "benchmarks" / "results" / "tmp" / "carry"
PACKAGES = (
    *("bitsandbytes", "googleapis-common-protos", "grpcio", "grpcio-health-checking"),
    *("grpcio-reflection", "grpcio-status", "protobuf", "pytest-asyncio"),
)
GLIBC = range(17, 40)  # minor versions of 2 that wheels may name
DOWNLOAD_SECONDS = 300


def use() -> None:
    """Let this process and those that it starts import from FOLDER, where it is there."""
    if FOLDER.is_dir():
        sys.path.insert(0, str(FOLDER))
        paths = [str(FOLDER), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def pinned(constraints: str) -> Mapping[str, str]:
    """``name==version`` of each package, by the name."""
    found = re.findall(r"^([\w.-]+)==(\S+)", constraints, re.MULTILINE)
    return {name: f"{name}=={version}" for name, version in found}


def fetch(folder: Path, python: str, cuda: str) -> None:
    """Download and unpack. Raises CalledProcessError or TimeoutExpired where that fails."""
    pins = pinned((ROOT / "constraints.txt").read_text())
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in reversed(GLIBC)]
    platforms += ["manylinux2014_x86_64", "manylinux1_x86_64"]
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", scratch]
        command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
        command += [word for name in platforms for word in ("--platform", name)]
        command += [pins.get(name, name) for name in PACKAGES]
        subprocess.run(command, check=True, timeout=DOWNLOAD_SECONDS)
        for wheel in sorted(Path(scratch).glob("*.whl")):
            unpack(wheel, folder, cuda)


def unpack(wheel: Path, folder: Path, cuda: str) -> None:
    """All of a wheel but bitsandbytes' libraries for other devices than ``cuda`` and the CPU."""
    wanted = {f"libbitsandbytes_cuda{cuda}.so", "libbitsandbytes_cpu.so"}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            file = name.rpartition("/")[2]
            if not file.startswith("libbitsandbytes") or file in wanted:
                archive.extract(name, folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    from benchmarks import lora_peers

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_carry",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--python", default="3.12", help="of the machine (default: 3.12)")
    parser.add_argument("--cuda", default="130", help="that its torch is for (default: 130)")
    args = parser.parse_args(argv)
    try:
        fetch(FOLDER, args.python, args.cuda)
    except (subprocess.SubprocessError, OSError) as e:
        log(f"error: {e}")
        return 1
    for folder in (FOLDER, lora_peers.FOLDER):
        log(f"take along: {folder.relative_to(ROOT)}")
    return 0 if lora_peers.FOLDER.is_dir() else lora_peers.main([])


if __name__ == "__main__":
    sys.exit(main())
