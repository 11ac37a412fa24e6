"""Run the benchmarks of performance: each part's JSON, table and picture, in one go.

    python -m benchmarks                         all parts but gpu; the peers take most of the time
    python -m benchmarks throughput growth       some parts
    python -m benchmarks --redraw                tables and pictures of stored results
    python -m benchmarks --readme                the README's section from stored results

A part is also a command of its own with flags: ``python -m benchmarks.NAME --help``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import cluster_report, gpu_shown, plots, tables
from benchmarks.report import ROOT, log
from router_training.report.style import drawing

RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Part:
    """A module of benchmarks/, its flags, those that shorten it, and how its result is shown."""

    module: str
    flags: tuple[str, ...] = ()
    shorter: tuple[str, ...] = ()
    table: Callable[[Mapping[str, Any]], str] = tables.others
    plot: Callable[[Mapping[str, Any]], Any] | None = None
    named_only: bool = False  # it needs a card, or takes its time


def _flags(line: str) -> tuple[str, ...]:
    return tuple(line.split())


# Fewer and shorter than the claims', so that all parts together take some 20 minutes on 2 cores.
PARTS: Mapping[str, Part] = {
    "throughput": Part(
        "throughput",
        _flags("--requests 1 4 16 64"),
        _flags(
            "--repeat 2 --peer-requests 1 16 --peer-repeat 1 --own 1 --tokens 32 --other-tokens 16 "
            "--peer-adapters 16"
        ),
        tables.throughput,
        plots.throughput,
    ),
    "growth": Part(
        "growth",
        (),
        _flags(
            "--repeat 1 --no-peers --tokens 16 --active 1 8 64 --ranks 4 16 64 --prompts 16 64 256"
        ),
        tables.growth,
        plots.growth,
    ),
    "overhead": Part(
        "overhead",
        (),
        _flags("--tokens 32 --repeat 3 --starts 2"),
        tables.overhead,
        plots.overhead,
    ),
    "step": Part("step", (), _flags("--rounds 5"), tables.step, plots.step),
    "registered": Part(
        "registered",
        (),
        _flags("--points --repeat 1 --requests 96 --tokens 32 --poisson-seconds 5"),
        tables.registered,
        plots.registered,
    ),
    "residency": Part("residency", (), _flags("--repeat 2"), tables.residency, plots.residency),
    "gpu": Part("gpu", table=gpu_shown.table, plot=gpu_shown.plot, named_only=True),
    "cluster": Part(
        "cluster_simulator",
        table=cluster_report.tables,
        plot=cluster_report.picture,
        named_only=True,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 where a part failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--full", action="store_true", help="as often as the claims: longer")
    parser.add_argument("--redraw", action="store_true", help="run nothing")
    parser.add_argument("--readme", action="store_true", help="write the README's section")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results are kept")
    args = parser.parse_args(argv)
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; give some of {', '.join(PARTS)}")
    names = args.parts or [name for name, part in PARTS.items() if not part.named_only]
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    if not (args.redraw or args.readme):
        failed = [name for name in names if not run(PARTS[name], name, args.out, names, args.full)]
    results = {
        name: json.loads(stored.read_text())
        for name in names
        if (stored := args.out / f"{name}.json").exists()
    }
    for name, result in results.items():
        show(PARTS[name], name, result, args.out)
    if args.readme:
        pictures = {name: f"benchmarks/results/{name}.png" for name in results if PARTS[name].plot}
        tables.write_readme(ROOT / "README.md", tables.readme(results, pictures))
    return 1 if failed else 0


def run(part: Part, name: str, out: Path, names: Sequence[str], full: bool) -> bool:
    """Run one part in a process of its own and keep its JSON; whether that went well."""
    log(f"[{names.index(name) + 1}/{len(names)}] {name} ...")
    start = time.monotonic()
    command = [sys.executable, "-m", f"benchmarks.{part.module}", "--json", *part.flags]
    command += () if full else part.shorter
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    took = time.monotonic() - start
    try:
        result = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    except (IndexError, json.JSONDecodeError):
        result = None
    if result is None:
        log(f"{name} failed after {took:.0f} s (exit status {done.returncode})")
        return False
    log(f"{name}: {took:.0f} s")
    (out / f"{name}.json").write_text(json.dumps({**result, "seconds": took}, indent=1) + "\n")
    return True


def show(part: Part, name: str, result: Mapping[str, Any], out: Path) -> None:
    """Write the part's table and picture."""
    text = f"# {name}\n\n{tables.where(result)}\n\n{part.table(result)}\n"
    (out / f"{name}.md").write_text(text)
    if part.plot is not None:
        with drawing():
            plots.save(part.plot(result), out / f"{name}.png")


if __name__ == "__main__":
    sys.exit(main())
