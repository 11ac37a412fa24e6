"""Measure what the project states: ``python -m benchmarks.claims --tag core``.

Reads claims.toml, runs each command once however many claims rest on it, and compares each
figure with its bar. Exits with 1 if a figure falls short or a command fails, with 2 if the
file of claims is wrong.
"""

from __future__ import annotations

import argparse
import difflib
import json
import operator
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT, environment, log

COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
}
Scalar = float | int | bool | str


class ClaimError(Exception):
    """The file of claims is wrong; the message says where and what to do."""


@dataclass(frozen=True)
class Claim:
    """One figure that the project states.

    ``figure`` is a dotted path into the command's JSON (``adapters.exact.0``); ``bar`` is what
    it is compared with; ``timeout`` is in seconds and holds for the whole command.
    """

    id: str
    tags: tuple[str, ...]
    statement: str
    command: str
    figure: str
    compare: str
    bar: Scalar
    timeout: float = 1800.0


@dataclass(frozen=True)
class Outcome:
    """What a claim came to; ``error`` says why there is no figure."""

    claim: Claim
    figure: Scalar | None
    holds: bool
    error: str = ""


@dataclass(frozen=True)
class Run:
    """One command: its JSON (None when it gave none), how it ended and seconds taken."""

    result: dict[str, Any] | None
    error: str
    seconds: float


def read_claims(path: Path) -> tuple[Claim, ...]:
    """Read and check a file of claims. Raises ClaimError."""
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as e:
        raise ClaimError(f"{path.name}: {e}") from e
    claims = tuple(_claim(entry) for entry in table.get("claim", []))
    seen: set[str] = set()
    for claim in claims:
        if claim.id in seen:
            raise ClaimError(f"claim {claim.id!r} stands twice; give each its own id")
        seen.add(claim.id)
    return claims


def _claim(entry: Mapping[str, Any]) -> Claim:
    name = entry.get("id", "without an id")
    fields = Claim.__dataclass_fields__
    for key in entry:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ClaimError(f"claim {name}: unknown key {key!r}{hint}")
    for key in fields:
        if key not in entry and key != "timeout":
            raise ClaimError(f"claim {name}: {key!r} is missing")
    if entry["compare"] not in COMPARISONS:
        known = ", ".join(COMPARISONS)
        raise ClaimError(f"claim {name}: compare {entry['compare']!r} is not one of {known}")
    return Claim(**{**entry, "tags": tuple(entry["tags"])})


def run_command(command: str, timeout: float) -> Run:
    """Run a claim's command from the repository's root; its stderr passes through.

    ``python`` as the first word is this interpreter. The command and all its children end when
    ``timeout`` seconds have passed.
    """
    words = shlex.split(command)
    if words[0] == "python":
        words[0] = sys.executable
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
    except OSError as e:
        return Run(None, f"cannot start: {e.strerror}", 0.0)
    try:
        stdout, _ = process.communicate(timeout=timeout)
        error = f"exit status {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        stdout, error = "", f"not done after {timeout:g} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result = _last_object(stdout)
    if result is None and not error:
        error = "no JSON object (without NaN) on the last line of its output"
    return Run(result, error, time.monotonic() - start)


def _last_object(stdout: str) -> dict[str, Any] | None:
    lines = stdout.strip().splitlines()
    try:
        value = json.loads(lines[-1], parse_constant=_refuse) if lines else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def figure_at(result: Any, path: str) -> Scalar:
    """The number, truth value or text at a dotted path. Raises KeyError when there is none."""
    value = result
    for part in path.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, ValueError, TypeError):
            raise KeyError(path) from None
    if not isinstance(value, (bool, int, float, str)):
        raise KeyError(path)
    return value


def judge(claim: Claim, run: Run) -> Outcome:
    """Compare a claim's figure with its bar; a failed command holds nothing."""
    figure: Scalar | None = None
    error = run.error
    if run.result is not None:
        try:
            figure = figure_at(run.result, claim.figure)
        except KeyError:
            error = error or f"no figure at {claim.figure!r} in the command's JSON"
    if error or figure is None:
        return Outcome(claim, figure, False, error)
    if isinstance(figure, str) != isinstance(claim.bar, str):
        return Outcome(claim, figure, False, f"{figure!r} and the bar are of different kinds")
    return Outcome(claim, figure, bool(COMPARISONS[claim.compare](figure, claim.bar)))


def measure(claims: Sequence[Claim]) -> tuple[list[Outcome], dict[str, Run]]:
    """Run the commands of ``claims``, each once, and judge; outcomes in the claims' order."""
    commands: dict[str, float] = {}
    for claim in claims:
        commands[claim.command] = max(claim.timeout, commands.get(claim.command, 0.0))
    runs: dict[str, Run] = {}
    for i, (command, timeout) in enumerate(commands.items(), 1):
        log(f"[{i}/{len(commands)}] {command}")
        runs[command] = run = run_command(command, timeout)
        log(f"[{i}/{len(commands)}] {run.error or 'done'} in {run.seconds:.1f} s")
    return [judge(claim, runs[claim.command]) for claim in claims], runs


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as aligned text: id, figure, bar, holds or not."""
    rows = [("claim", "figure", "bar", "")]
    for o in outcomes:
        verdict = "holds" if o.holds else f"FALLS SHORT{f' ({o.error})' if o.error else ''}"
        figure = "-" if o.figure is None else _text(o.figure)
        rows.append((o.claim.id, figure, f"{o.claim.compare} {_text(o.claim.bar)}", verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d}".rstrip() for a, b, c, d in rows
    )


def _text(value: Scalar) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__)
    parser.add_argument("--tag", help="only claims with this tag")
    parser.add_argument("--id", action="append", default=[], help="only this claim (repeatable)")
    parser.add_argument("--list", action="store_true", help="print the claims, run nothing")
    parser.add_argument("--file", type=Path, default=ROOT / "benchmarks" / "claims.toml")
    parser.add_argument(
        "--out", type=Path, help="JSON file of the outcome (default: benchmarks/results/tmp/)"
    )
    args = parser.parse_args(argv)
    try:
        claims = _select(read_claims(args.file), args.tag, args.id)
    except ClaimError as e:
        log(f"error: {e}")
        return 2
    if args.list:
        for claim in claims:
            print(f"{claim.id} [{', '.join(claim.tags)}]: {claim.statement}")
        return 0
    before = environment()
    outcomes, runs = measure(claims)
    print(table(outcomes))
    held = sum(o.holds for o in outcomes)
    print(f"\n{held} of {len(outcomes)} hold")
    name = f"claims-{args.tag or 'selected'}.json"
    out: Path = args.out or ROOT / "benchmarks" / "results" / "tmp" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        **before,
        "claims": [asdict(o) for o in outcomes],
        "commands": {command: asdict(run) for command, run in runs.items()},
    }
    out.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if held == len(outcomes) else 1


def _select(claims: Sequence[Claim], tag: str | None, ids: Sequence[str]) -> tuple[Claim, ...]:
    for name in ids:
        if all(claim.id != name for claim in claims):
            raise ClaimError(f"no claim has the id {name!r}")
    chosen = tuple(c for c in claims if (tag is None or tag in c.tags) and (not ids or c.id in ids))
    if not chosen:
        tags = sorted({tag for claim in claims for tag in claim.tags})
        raise ClaimError(f"no claim has the tag {tag!r}; tags in use: {', '.join(tags)}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
