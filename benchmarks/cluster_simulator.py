"""How a cluster grows: hit rate, first token and cost from 1 to 1,000 replicas, by simulation.

What a step, a prompt's token and an adapter's load take is measured first, on one real server (the
demo's base, one thread, over gRPC), or read from ``--profile``. The grid then plays Zipf traffic,
as much for each replica, against each routing. Lastly its predictions are held against real ones
under the same arrivals: one server, and a cluster of two replicas on Ray Serve (the extra ``ray``),
with our request router and with Ray's, which is power-of-two. What a step and a first token take
there is measured with both replicas at work: they share this machine's cores, with the gateway and
this client too. What else runs here shows as error.
The demo's adapters load in about a millisecond, so that its first tokens hardly depend on the hit
rate; ``--load-seconds`` asks what they would do with slower loads, of larger adapters.

    python -m benchmarks.cluster_simulator --json
    python -m benchmarks.cluster_simulator --no-grid           calibration and real servers only
    python -m benchmarks.cluster_simulator --no-check --profile FILE --replicas 1 50 --adapters 500
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import cluster_reality, report
from benchmarks.cluster_model import simulate
from benchmarks.cluster_reality import Work
from benchmarks.cluster_report import tables
from benchmarks.replica_model import Limits, Profile
from mora_serve.cluster.policy import ROUTINGS, Routing

ON_RAY: tuple[Routing, ...] = ("affinity", "power-of-two")


def main(argv: Sequence[str] | None = None) -> None:
    """Calibrate, simulate, compare, print, report."""
    args = parse(argv)
    work = Work(
        **{
            key: getattr(args, f"check_{key}")
            for key in ("adapters", "slots", "seconds", "utilisation")
        },
        prompt=args.prompt,
        output=args.output,
        rank=args.rank,
        exponent=args.exponent,
        seed=args.seed,
    )
    checks: list[dict[str, Any]] = []
    if args.profile is not None and args.no_check:
        profile = Profile.from_json(json.loads(args.profile.read_text()))
    else:
        with cluster_reality.adapters(work) as root:
            profile = cluster_reality.calibrate(root, work)
            report.log(f"profile: {profile.as_json()}")
            if not args.no_check:
                checks = check(root, profile, work)
    start = time.perf_counter()
    if args.load_seconds is not None:
        profile = replace(profile, load=args.load_seconds, first_load=args.load_seconds)
    rows = [] if args.no_grid else grid(profile, args)
    took = time.perf_counter() - start
    result = {
        "profile": profile.as_json(),
        "grid": rows,
        "grid_seconds": took,
        "checks": checks,
        **figures(checks),
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "environment": report.environment(),
    }
    report.log(tables(result))
    report.emit(result)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cluster_simulator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--profile", type=Path, help="JSON of an earlier profile (with --no-check)")
    parser.add_argument("--no-grid", action="store_true")
    parser.add_argument("--no-check", action="store_true", help="without the real servers' runs")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--adapters", type=int, nargs="+", default=[10, 100, 1000, 10_000, 100_000])
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--slots", type=int, default=32, help="of a replica")
    parser.add_argument("--host", type=int, default=1000, help="adapters in a replica's memory")
    parser.add_argument("--load-seconds", type=float, help="of an adapter, for the measured ones")
    parser.add_argument("--exponent", type=float, default=1.0, help="of zipf: 1/rank^exponent")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--output", type=int, default=128, help="tokens")
    parser.add_argument("--rank", type=int, default=8, help="of the real servers' adapters")
    parser.add_argument(
        "--utilisation",
        type=float,
        default=0.7,
        help="requests arrive at this share of what replicas could do one request at a time",
    )
    parser.add_argument("--requests", type=int, default=20, help="of each replica, at least 2,000")
    parser.add_argument("--check-utilisation", type=float, default=0.25)
    parser.add_argument("--check-seconds", type=float, default=40.0, help="of each real run")
    parser.add_argument("--check-adapters", type=int, default=24)
    parser.add_argument("--check-slots", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if min(*args.replicas, *args.adapters, args.slots, args.prompt, args.output) < 1:
        parser.error("--replicas, --adapters, --slots, --prompt and --output: give 1 or more")
    if args.load_seconds is not None and args.load_seconds < 0:
        parser.error("--load-seconds: give 0 or more")
    if args.utilisation <= 0 or args.check_utilisation <= 0:
        parser.error("--utilisation and --check-utilisation: give numbers above 0")
    return args


def grid(profile: Profile, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a point: the same for the same arguments."""
    limits = Limits(slots=args.slots, host=args.host)
    alone = args.prompt * profile.prompt_token + args.output * profile.step[1]

    def point(replicas: int, adapters: int, routing: Routing) -> dict[str, Any]:
        return simulate(
            replicas,
            adapters,
            routing,
            profile,
            limits,
            rate=args.utilisation * replicas / alone,
            requests=max(2000, args.requests * replicas),
            warm=max(5000, 3 * args.slots * replicas),
            exponent=args.exponent,
            prompt=args.prompt,
            output=args.output,
            seed=args.seed,
        )

    points = itertools.product(args.replicas, args.adapters, args.routings)
    return [point(*where) for where in points]


def check(root: Path, profile: Profile, work: Work) -> list[dict[str, Any]]:
    """Predictions, made before each run, and what was measured."""
    shared = cluster_reality.calibrate(root, work, 2)
    report.log(f"profile of a replica: {shared.as_json()}")
    cases: list[tuple[int, Routing, Profile]] = [
        (1, "random", profile),
        *((2, routing, shared) for routing in ON_RAY),
    ]
    checks = []
    for servers, routing, profile in cases:
        trace = cluster_reality.traffic(profile, work, servers)
        told = cluster_reality.modelled(profile, work, servers, routing, trace)
        seen = cluster_reality.real(root, work, servers, routing, trace)
        errors = cluster_reality.errors(told, seen)
        report.log(f"{servers} servers, {routing}: {errors}")
        checks.append(
            {
                "servers": servers,
                "routing": routing if servers > 1 else "one server",
                "foretold": told,
                "measured": seen,
                "errors": errors,
                "load": report.environment()["load"],
            }
        )
    return checks


def figures(checks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The largest relative errors: of all, of the clusters alone, and of each figure."""
    if not checks:
        return {}
    keys = list(checks[0]["errors"])
    largest = {key: max(c["errors"][key] for c in checks) for key in keys}
    clusters = [max(c["errors"].values()) for c in checks if c["servers"] > 1]
    return {
        "largest_error": max(largest.values()),
        "largest_error_of_clusters": max(clusters, default=0.0),
        "largest_errors": largest,
    }


if __name__ == "__main__":
    main()
