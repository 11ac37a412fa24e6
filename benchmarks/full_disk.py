"""A disk that fills: the registry on a small file system of its own, filled to the last block.

In a mount namespace of its own a tmpfs is mounted, of a few MiB, and another of few inodes: as
root, or in a user namespace where that is allowed; without either this cannot run. Random changes
meet a random amount of room: each has to be made or refused with DISK_FULL, as a whole, as the next
start sees it, on the full disk; a removal is never refused while its reserve is there.

    python -m benchmarks.full_disk --json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from benchmarks import report, tiny
from benchmarks.crash_model import Model, Step, apply, random_step
from benchmarks.crashes import look, opened
from mora_serve.adapters.disk import RESERVE_FILES
from mora_serve.adapters.registry import Registry
from mora_serve.errors import MoraError
from mora_serve.router.feedback import FeedbackRow, FeedbackStore, Position

ROUNDS = 150
SIZE = 3 << 20
INODES = 160
STEPS = 12  # changes tried in a round, on a disk that has less and less room
BLOCK = 4096
FEEDBACK_BYTES = 1 << 20

MOUNT = 'mount -t tmpfs -o "$1" mora-full-disk "$2" && shift 2 && exec "$@"'


def main() -> None:
    """Fill the disk and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--inodes", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside is not None:
        logging.getLogger("mora_serve").addHandler(
            logging.NullHandler()
        )  # it tells of each refusal
        ballast = Inodes(args.inside) if args.inodes else Ballast(args.inside)
        report.emit(measure(args.inside, ballast, args.rounds, args.seed))
        return
    rounds, seed = args.rounds, args.seed
    results = {
        f"tmpfs of {SIZE >> 20} MiB": mounted(f"size={SIZE}", rounds, seed),
        f"tmpfs of {INODES} inodes": mounted(
            f"size=64m,nr_inodes={INODES}", rounds, seed + 1, "--inodes"
        ),
    }
    report.emit(
        {
            "wrong": sum(r["wrong"] for r in results.values()),
            "refused": sum(r["refused"] for r in results.values()),
            "disk": ", ".join(results),
            "results": results,
            "environment": report.environment(),
        }
    )


def mounted(options: str, rounds: int, seed: int, *arguments: str) -> dict[str, Any]:
    """``measure`` on a tmpfs with these options."""
    namespace = ["unshare", "--mount"] + (["--map-root-user"] if os.geteuid() else [])
    with tempfile.TemporaryDirectory() as folder:
        mount = [*namespace, "sh", "-c", MOUNT, "sh", options, folder]
        if (
            shutil.which("unshare") is None
            or subprocess.run([*mount, "true"], capture_output=True, check=False).returncode
        ):
            raise SystemExit("no tmpfs can be mounted here: run it as root, with util-linux")
        measured = [sys.executable, "-m", "benchmarks.full_disk", "--inside", folder]
        done = subprocess.run(
            [*mount, *measured, f"--rounds={rounds}", f"--seed={seed}", *arguments],
            stdout=subprocess.PIPE,
            cwd=report.ROOT,
            timeout=1200,
            check=True,
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(folder: Path, ballast: Ballast, rounds: int, seed: int) -> dict[str, Any]:
    """Random changes to one registry, with random room."""
    rng = random.Random(seed)
    state = folder / "state"
    model, wrong = Model(), list[str]()
    counts = {"made": 0, "refused": 0, "removals": 0, "starts": 0}
    for number in range(rounds):
        ballast.fill(rng.randrange(0, 60))
        try:
            with opened(state) as registry:
                counts["starts"] += 1
                for _ in range(STEPS):
                    step = random_step(rng, model)
                    model = _try(registry, state, step, model, counts, wrong)
                    if rng.random() < 0.5:
                        ballast.fill(rng.randrange(0, 3))
            found, complaints = look(state)  # on the full disk
            counts["starts"] += 1
            complaints = [c for c in complaints if "no room is kept back" not in c]
            if found != model:
                wrong.append(f"round {number}: {model.difference(found)}")
            wrong += [f"round {number}: {text}" for text in complaints]
            model = found
        except Exception as e:  # whatever it is, it is no typed refusal
            wrong.append(f"round {number}: {type(e).__name__}: {e}")
        ballast.drop()
        for text in wrong[-1:]:
            report.log(text)
    return {
        "rounds": rounds,
        **counts,
        **damaged(state, ballast, wrong),
        **feedback(folder, ballast, wrong),
        "read_only": read_only(folder, state, wrong),
        "wrong": len(wrong),
        "what": wrong[:20],
    }


def _try(
    registry: Registry,
    state: Path,
    step: Step,
    model: Model,
    counts: dict[str, int],
    wrong: list[str],
) -> Model:
    """Try a change; what the registry should hold then."""
    reserved = len(list(state.glob("reserve-*"))) == RESERVE_FILES
    try:
        apply(registry, step)
    except MoraError as e:
        counts["refused"] += 1
        if e.reason != "DISK_FULL" or (step.kind == "unregister" and reserved):
            wrong.append(f"{step}: {e.reason}: {e.message}")
    else:
        counts["made"] += 1
        counts["removals"] += step.kind == "unregister"
        model = model.after(step)
    if (found := Model.of(registry)) != model:
        wrong.append(f"{step}: half made: {model.difference(found)}")
    return model


def damaged(state: Path, ballast: Ballast, wrong: list[str]) -> dict[str, Any]:
    """A content that is found damaged on the full disk is not offered, after a restart neither."""
    with opened(state) as registry:
        for name, seed in (("hurt", 7), ("kept", 6)):
            apply(registry, Step("register", name, seed))
    digest = tiny.adapter(7, 2).digest
    path = state / "blobs" / digest / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    ballast.fill(0)
    offered = []
    for _ in range(2):
        with opened(state) as registry:
            offered.append([r.name for r in registry.all() if r.digest == digest])
            if not any(r.name == "kept" for r in registry.all()):
                wrong.append("the rest is not served")
    with opened(state) as registry:
        registry.unregister("default", "hurt")
    if any(offered):
        wrong.append(f"a damaged content is offered: {offered}")
    ballast.drop()
    return {"damaged_offered": sum(map(len, offered))}


def feedback(folder: Path, ballast: Ballast, wrong: list[str]) -> dict[str, Any]:
    """Rows of feedback that were taken are there after the disk was full, and whole."""
    store = FeedbackStore(folder / "feedback", FEEDBACK_BYTES)
    ballast.fill(6)
    taken: list[str] = []
    refused = 0
    for i in range(400):
        text = f"{i} " + "x" * 200
        row = FeedbackRow("default", text, ("t",), (), (), "", "", 0.0)
        try:
            store.append([row])
            taken.append(text)
        except OSError:
            refused += 1
    ballast.drop()
    again = FeedbackStore(folder / "feedback", FEEDBACK_BYTES)
    found, at, last = [], Position(), False
    while not last:
        page = again.read(at, "default")
        found += [r.prompt for r in page.rows]
        at, last = page.end, page.last
    if found != taken:
        wrong.append(f"feedback: {len(taken)} rows were taken, {len(found)} are there")
    return {"feedback_rows": len(taken), "feedback_refused": refused}


def read_only(folder: Path, state: Path, wrong: list[str]) -> bool:
    """A state that can only be read is served, and a change of it is refused with DISK_FAILED.

    Whether that was looked at: only the root of a mount can make it so.
    """
    remount = ["mount", "-o", "remount,ro", str(folder)]
    if subprocess.run(remount, capture_output=True, check=False).returncode:
        return False
    with opened(state) as registry:
        if not registry.all():
            wrong.append("nothing is served from a disk that can only be read")
        for step in (Step("register", "new", 5), Step("unregister", "kept")):
            before = Model.of(registry)
            try:
                apply(registry, step)
                wrong.append(f"{step}: made on a disk that can only be read")
            except MoraError as e:
                if e.reason != "DISK_FAILED" or Model.of(registry) != before:
                    wrong.append(f"{step}: {e.reason}: {e.message}")
    return True


class Ballast:
    """A file that takes the room of a disk, but for some blocks."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "ballast"

    def fill(self, left: int) -> None:
        """Leave about so many blocks, or none if there are fewer."""
        with open(self._path, "ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                status = os.statvfs(self._path.parent)
                size = status.f_bavail * status.f_frsize - left * BLOCK
                if size < BLOCK:
                    return
                file.write(bytes(min(size, 1 << 18)))

    def drop(self) -> None:
        """Give all of it back."""
        self._path.unlink(missing_ok=True)


class Inodes(Ballast):
    """Empty files, which take the inodes of a disk."""

    def fill(self, left: int) -> None:
        """Leave about so many inodes."""
        self._path.mkdir(exist_ok=True)
        with contextlib.suppress(OSError):
            while os.statvfs(self._path).f_favail > left:
                Path(self._path, uuid.uuid4().hex).touch()

    def drop(self) -> None:
        """Remove them."""
        shutil.rmtree(self._path, ignore_errors=True)


if __name__ == "__main__":
    main()
