"""Tokens a second and latencies of the served system beside transformers and PEFT.

A Llama of 100M parameters (or any other size by flags) in NF4; prompts of 32 and answers of 256
tokens; adapters of rank 16 on all seven projections. Ours runs in a server process and is asked
through gRPC streaming, all requests at once; the peers run in this process on the same files. Ours
and the peers take turns (A B A B), each turn with prompts of its own, which are the same for all;
medians count. Prompts are included.

What claims rest on, 1 and 16 requests, has ``--repeat`` repetitions of ``--tokens`` tokens. There a
peer's repetitions after the first are cut to fewer tokens where its first whole one shows that its
rate until there is the same (``--tolerance``). Other peers there, and all systems of other cells,
have answers of ``--other-tokens``; a peer's one repetition is beside three of ours, as are all of a
peer's with ``--peer-repeat 1``. Where a peer's answers are shorter than ours, what it is compared
with is our rate until there. PEFT gets ``--peer-adapters`` at most, as it takes minutes to load
many: cells with more distinct ones are without it.

What is claimed of ours against ours (distinct adapters against none, say) is measured apart,
``--own`` times at 16 requests: the kinds take turns, and the median of the turns' ratios counts.

    python -m benchmarks.throughput --json                      # 1 and 16 requests
    python -m benchmarks.throughput --requests 1 4 16 64        # all cells
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.peers import Peers, notes
from benchmarks.plots import KINDS
from benchmarks.served import Served
from benchmarks.tables import percentile
from benchmarks.turns import OURS, System, Work, row, take_turns
from benchmarks.workload import Workload, mixtures
from mora_serve.cli.output import table

CLAIMED = (1, 16)  # requests
CLAIMED_SYSTEMS = (OURS, "transformers generate", "PEFT mixed batch")
SHORTER = (64, 128)  # tokens that a peer's later repetitions may be cut to
MOST_IN_TURN = 4  # requests that are answered one after another: more take as long each
# tokens/s of the same peers measured before, on a quiet machine with 2 cores and AVX-512; 16
# requests, but for the last
EARLIER = {"generate": 319.0, "one": 251.0, "distinct": 92.0, "generate at 1": 80.0}


def main() -> None:
    """Measure, print a table, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--requests", type=int, nargs="*", default=list(CLAIMED))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--peer-requests", type=int, nargs="*", help="at which the peers run; left out: all"
    )
    parser.add_argument("--peer-repeat", type=int, help="of the peers; left out, as --repeat")
    parser.add_argument(
        "--peer-adapters", type=int, default=64, help="the most that PEFT gets: it loads slowly"
    )
    parser.add_argument("--other-tokens", type=int, default=64)
    parser.add_argument(
        "--tolerance", type=float, default=0.03, help="of the rate, by fewer tokens"
    )
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--own", type=int, default=5, help="turns of ours against ours; 0: none")
    Workload.add_arguments(parser)
    args = parser.parse_args()
    if args.peer_adapters < min(max(CLAIMED), max(args.requests)):
        parser.error(f"--peer-adapters: give at least {max(CLAIMED)}")
    with tempfile.TemporaryDirectory() as folder:
        rows, own, peers = compare(Path(folder), args)
    report.log(as_table(rows))
    report.emit(
        {
            "rows": rows,
            "own": own,
            "figures": {**figures(rows), **own_figures(own)},
            "peers": {**peers, "ratios": peer_ratios(rows)},
            "threads": torch.get_num_threads(),
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS", ""),
            "arguments": vars(args),
            "environment": report.environment(),
        }
    )


def compare(
    root: Path, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, list[float]], dict[str, Any]]:
    """All cells, ours against ours, and what there is to say of the peers."""
    workload = Workload.of(args)
    workload.write_base(root / "base")
    own = max(CLAIMED) if args.own else 2
    names = workload.write_adapters(root / "adapters", max(*args.requests, own))
    peers = None
    if not args.no_peers:
        report.log("loading the peers ...")
        peers = Peers(root, workload, names[: args.peer_adapters])
        peers.settle([n for n in args.requests if n in CLAIMED] or args.requests)
        report.log(str(peers.settings))
    rows: list[dict[str, Any]] = []
    flags = {"adapters.max_rank": workload.rank, "adapters.slots": max(32, len(names))}
    with Served(root, names, flags) as served:
        for kind in args.kinds:
            for count in args.requests:
                wanted = args.peer_requests is None or count in args.peer_requests
                beside = peers if wanted else None
                systems = [System(OURS, served.run), *peers_of(beside, kind, count)]
                rows += cell(workload, kind, count, systems, args)
        turns = own_turns(served.run, workload, args.kinds, max(CLAIMED), args.own, args.tokens)
    said = {"settings": peers.settings, "notes": notes()} if peers else {}
    return rows, turns, said


def peers_of(peers: Peers | None, kind: str, count: int) -> list[System]:
    """The peers that can do a cell's work."""
    if peers is None or kind == "mixtures":
        return []
    if kind == "distinct" and count > len(peers.adapters):
        return []
    if kind == "none":
        return [
            System("transformers generate", peers.generate),
            System("transformers continuous batching", peers.continuous),
        ]
    mixed = System("PEFT mixed batch", peers.mixed_batch)
    if kind == "one":
        return [mixed, System("PEFT one adapter set", peers.one_active)]
    in_turn = [System("PEFT one after another", peers.one_after_another)]
    return [mixed, *(in_turn if count <= MOST_IN_TURN else [])]


def adapters_of(kind: str, count: int) -> list[dict[str, float]]:
    """The mixtures of a cell's requests; two-adapter ones are over as many adapters."""
    active, size = {
        "none": (1, 0),
        "one": (1, 1),
        "distinct": (count, 1),
        "mixtures": (max(count, 2), 2),
    }[kind]
    return mixtures(count, active, size)


def cell(
    workload: Workload,
    kind: str,
    count: int,
    systems: Sequence[System],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A row for each system: they take turns."""
    for system in systems:
        size(system, count, args)

    def after(system: System) -> None:
        if system.repeat > 1 and len(system.runs) == 1 and system.name != OURS:
            cut(system, args.tolerance)

    take_turns(systems, workload, adapters_of(kind, count), after)
    described = {"adapters": kind, "requests": count}
    return [row(described, system, systems[0]) for system in systems]


def size(system: System, count: int, args: argparse.Namespace) -> None:
    """How often a system answers a cell's requests, and how long the answers are."""
    ours = system.name == OURS
    claimed = count in CLAIMED and system.name in CLAIMED_SYSTEMS
    system.tokens = args.tokens if claimed else args.other_tokens
    most = args.repeat if ours else args.peer_repeat or args.repeat
    system.repeat = most if claimed else min(3 if ours else 1, most)


def own_turns(
    work: Work, workload: Workload, kinds: Sequence[str], count: int, turns: int, tokens: int
) -> dict[str, list[float]]:
    """Ours at each kind of mixtures, which take turns: rates by turn."""
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(turns):
        prompts = workload.prompts(count, turn)
        for kind in kinds if turn % 2 == 0 else reversed(kinds):
            rates[kind].append(work(prompts, adapters_of(kind, count), tokens).rate())
    return rates


def own_figures(rates: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Medians of the turns' ratios, of those kinds that were measured."""
    pairs = (("mixtures", "distinct"), ("distinct", "none"), ("one", "none"))
    return {
        f"{a}_16_over_{b}": statistics.median(
            mine / other for mine, other in zip(rates[a], rates[b], strict=True)
        )
        for a, b in pairs
        if rates.get(a) and rates.get(b)
    }


def cut(system: System, tolerance: float) -> None:
    """Shorten the repetitions to come where the first shows that the rate stays the same."""
    (run,) = system.runs
    whole = run.rate()
    lengths = [n for n in (*SHORTER, system.tokens) if n <= system.tokens]
    system.whole = {str(n): run.rate(n) for n in lengths}
    system.tokens = next(n for n in lengths if abs(run.rate(n) / whole - 1) <= tolerance)


def rate(rows: Sequence[Mapping[str, Any]], kind: str, count: int, system: str) -> float | None:
    """A cell's tokens a second, if it was measured."""
    for r in rows:
        if (r["adapters"], r["requests"], r["system"]) == (kind, count, system):
            return r.get("tokens_per_second")
    return None


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Ours over the peers, as claimed, of those whose cells were measured."""
    none, distinct = ((kind, 16, OURS) for kind in ("none", "distinct"))
    generate, peft = "transformers generate", "PEFT mixed batch"
    wanted = {
        "distinct_16_over_peft": (distinct, ("distinct", 16, peft)),
        "none_16_over_generate": (none, ("none", 16, generate)),
        "none_1_over_generate": (("none", 1, OURS), ("none", 1, generate)),
    }
    found = {name: (rate(rows, *a), rate(rows, *b)) for name, (a, b) in wanted.items()}
    return {name: a / b for name, (a, b) in found.items() if a and b}


def peer_ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The peers' rates over that of ``generate`` at 16 requests, beside earlier ones."""
    here = {
        "generate": rate(rows, "none", 16, "transformers generate"),
        "one": rate(rows, "one", 16, "PEFT mixed batch"),
        "distinct": rate(rows, "distinct", 16, "PEFT mixed batch"),
        "generate at 1": rate(rows, "none", 1, "transformers generate"),
    }
    if (unit := here["generate"]) is None:
        return {}
    ratios = {
        name: {
            "here": got / unit,
            "earlier": EARLIER[name] / EARLIER["generate"],
            "tokens_per_second": got,
            "earlier_tokens_per_second": EARLIER[name],
        }
        for name, got in here.items()
        if got is not None
    }
    off = {name: r["here"] / r["earlier"] - 1 for name, r in ratios.items()}
    return {
        "over_generate": ratios,
        "deviation": off,
        "largest_deviation": max(abs(d) for d in off.values()),
    }


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All rows for people."""
    cells = []
    for r in rows:
        if "failure" in r:
            cells.append((r["adapters"], str(r["requests"]), r["system"], "cannot", "", "", "", ""))
            continue
        cells.append(
            (
                r["adapters"],
                str(r["requests"]),
                r["system"],
                f"{r['tokens_per_second']:.1f}",
                percentile(r["first_token_ms"], "p50", 0),
                *(percentile(r["inter_token_ms"], p) for p in ("p50", "p99")),
                f"{r['repetitions']}x{r['new_tokens']}",
            )
        )
    titles = ("adapters", "requests", "system", "tokens/s", "first ms", "gap ms", "p99", "runs")
    return table(titles, cells, right=(1, 3, 4, 5, 6))


if __name__ == "__main__":
    main()
