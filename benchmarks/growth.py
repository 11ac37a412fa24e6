"""How throughput and latency change as things grow, on the workload of ``throughput``.

- ``active``: 64 requests over 1, 2, 4, ... 64 adapters;
- ``rank``: 16 requests with distinct adapters of rank 4 to 64, on a server that takes up to 64;
- ``prompt``: 16 requests with prompts of 16 to 1024 tokens, without and with distinct adapters;
- ``mixture``: 16 requests over 16 adapters, 1 to 4 of them each.

Ours is served and asked over gRPC; the peers that can do the work answer at some of the points, in
turn with ours, on the same prompts. All answers have the same number of tokens.

    python -m benchmarks.growth --json
    python -m benchmarks.growth --sweeps active mixture --no-peers
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.peers import Peers
from benchmarks.served import Served
from benchmarks.tables import percentile
from benchmarks.turns import OURS, System, row, take_turns
from benchmarks.workload import Mixtures, Workload, mixtures
from mora_serve.cli.output import table

Rows = list[dict[str, Any]]


def main() -> None:
    """Measure, print a table, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sweeps", nargs="*", choices=tuple(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--active", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 8, 16, 32, 64])
    parser.add_argument("--prompts", type=int, nargs="*", default=[16, 64, 256, 1024])
    parser.add_argument("--mixtures", type=int, nargs="*", default=[1, 2, 3, 4])
    parser.add_argument("--requests", type=int, default=16, help="but for active: its largest")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    Workload.add_arguments(parser)
    parser.set_defaults(tokens=32)
    args = parser.parse_args()
    sweeps: dict[str, Rows] = {}
    for name in args.sweeps:
        with tempfile.TemporaryDirectory() as folder:
            sweeps[name] = SWEEPS[name](Sweep(name, Path(folder), args))
    for name, rows in sweeps.items():
        report.log(as_table(name, rows))
    report.emit(
        {
            "sweeps": sweeps,
            "figures": figures(sweeps),
            "arguments": vars(args),
            "environment": report.environment(),
        }
    )


@dataclass(frozen=True)
class Point:
    """One point of a sweep; ``peer`` is the kind of peer that answers as well, empty for none."""

    described: dict[str, Any]
    work: Workload
    wanted: Mixtures
    peer: str = ""


class Sweep:
    """One sweep's base, server and peers under ``root``, and its points."""

    def __init__(self, name: str, root: Path, args: argparse.Namespace) -> None:
        self.name, self.root, self.args = name, root, args
        self.work = Workload.of(args)
        self.work.write_base(root / "base")

    def points(
        self,
        names: list[str],
        points: Sequence[Point],
        rank: int,
        slots: int,
    ) -> Rows:
        """A row a system for each point. ``names`` are the adapters' folders."""
        rows: Rows = []
        peers = None if self.args.no_peers else self._peers(points)
        flags = {"adapters.max_rank": rank, "adapters.slots": slots}
        with Served(self.root, names, flags) as served:
            for point in points:
                work = point.work
                if peers is not None and point.peer and work.prompt != peers.workload.prompt:
                    self._settle(peers, work, [point])
                systems = [System(OURS, served.run, self.args.repeat, work.tokens)]
                if peers is not None and point.peer == "none":
                    systems.append(System("transformers generate", peers.generate, 1, work.tokens))
                if peers is not None and point.peer == "mixed":
                    systems.append(System("PEFT mixed batch", peers.mixed_batch, 1, work.tokens))
                take_turns(systems, work, point.wanted)
                rows += [row(point.described, system, systems[0]) for system in systems]
        return rows

    def _peers(self, points: Sequence[Point]) -> Peers | None:
        asked = [point for point in points if point.peer]
        if not asked:
            return None
        used = {name for point in asked for mixture in point.wanted for name in mixture}
        peers = Peers(self.root, self.work, sorted(used))
        self._settle(peers, asked[0].work, asked)
        return peers

    def _settle(self, peers: Peers, work: Workload, points: Sequence[Point]) -> None:
        """Let the peers choose how to compute, for prompts of this length."""
        peers.workload = work
        most = min(16, len(points[0].wanted))  # enough to choose by
        peers.settle([most], sorted({point.peer for point in points}))
        report.log(str(peers.settings))


def active(sweep: Sweep) -> Rows:
    """More adapters among the same number of requests."""
    counts = sweep.args.active
    requests = max(counts)
    names = sweep.work.write_adapters(sweep.root / "adapters", requests)
    asked = {counts[0], counts[len(counts) // 2], counts[-1]}
    points = [
        Point(
            {"active": n, "requests": requests},
            sweep.work,
            mixtures(requests, n, 1),
            "mixed" if n in asked else "",
        )
        for n in counts
    ]
    return sweep.points(names, points, sweep.work.rank, max(32, requests))


def rank(sweep: Sweep) -> Rows:
    """Adapters of higher rank."""
    requests, ranks = sweep.args.requests, sweep.args.ranks
    names: list[str] = []
    for r in ranks:
        work = replace(sweep.work, rank=r)
        names += work.write_adapters(sweep.root / "adapters", requests, f"rank{r}-")
    points = [
        Point(
            {"rank": r, "requests": requests},
            sweep.work,
            [{f"rank{r}-{i}": 1.0} for i in range(requests)],
            "mixed" if r in (ranks[0], ranks[-1]) else "",
        )
        for r in ranks
    ]
    return sweep.points(names, points, max(ranks), max(requests, 4))


def prompt(sweep: Sweep) -> Rows:
    """Longer prompts."""
    requests, lengths = sweep.args.requests, sweep.args.prompts
    names = sweep.work.write_adapters(sweep.root / "adapters", requests)
    points = [
        Point(
            {"prompt": n, "adapters": kind, "requests": requests},
            replace(sweep.work, prompt=n),
            wanted,
            "none" if kind == "none" and n != lengths[1] else "",
        )
        for n in lengths
        for kind, wanted in {
            "none": mixtures(requests, 1, 0),
            "distinct": mixtures(requests, requests, 1),
        }.items()
    ]
    return sweep.points(names, points, sweep.work.rank, max(32, requests))


def mixture(sweep: Sweep) -> Rows:
    """More adapters in each request."""
    requests = sweep.args.requests
    names = sweep.work.write_adapters(sweep.root / "adapters", max(requests, 4))
    points = [
        Point({"mixture": n, "requests": requests}, sweep.work, mixtures(requests, len(names), n))
        for n in sweep.args.mixtures
    ]
    return sweep.points(names, points, sweep.work.rank, max(32, requests))


SWEEPS: Mapping[str, Callable[[Sweep], Rows]] = {
    "active": active,
    "rank": rank,
    "prompt": prompt,
    "mixture": mixture,
}


def figures(sweeps: Mapping[str, Rows]) -> dict[str, float]:
    """Our throughput at the last point of a sweep over that at its first."""
    found = {}
    for name, rows in sweeps.items():
        kinds = {r.get("adapters", "") for r in rows}
        for kind in kinds:
            ours = [r for r in rows if r["system"] == OURS and r.get("adapters", "") == kind]
            first, last = ours[0], ours[-1]
            key = f"{name}_{last[name]}_over_{first[name]}{'_' + kind if kind else ''}"
            found[key] = last["tokens_per_second"] / first["tokens_per_second"]
    return found


def as_table(name: str, rows: Rows) -> str:
    """A sweep for people."""
    cells = [
        (
            f"{r[name]}{', ' + r['adapters'] if 'adapters' in r else ''}",
            str(r["requests"]),
            r["system"],
            r["failure"]
            if "failure" in r
            else f"{r['tokens_per_second']:.1f} ({r['least']:.1f}-{r['most']:.1f})",
            percentile(r.get("first_token_ms", {}), "p50", 0),
            percentile(r.get("inter_token_ms", {}), "p50"),
        )
        for r in rows
    ]
    titles = (name, "requests", "system", "tokens/s", "first token ms", "between ms")
    return table(titles, cells, right=(1, 3, 4, 5))


if __name__ == "__main__":
    main()
