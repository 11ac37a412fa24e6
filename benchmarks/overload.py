"""Ten times the load that a server can serve, for a minute: what gets through, and what is refused.

A small Llama in NF4 (another size by flags) in a process of its own, whose engine computes on one
thread: gRPC and the load generator have the other core of two. First as many callers as its batch
has places, and as many again in line, ask one after another: the capacity. Then Poisson arrivals at
ten times that rate, each with a deadline of so many times what an answer takes in a full batch.
Half of all comes with one tenant's key, half with another's. Goodput counts whole answers within
their deadline, from when they were due; the beginning, in which no answer can have ended, is left
out of both rates. The load generator is another process on the same cores: its processor time is
given. Meanwhile the server is asked for its health twenty times a second.

    python -m benchmarks.overload --json
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.keys import add_key
from benchmarks.open_loop import percentiles, poisson
from benchmarks.raw_load import Answer, Flow, counts, payload, run, saturated, steady, untyped
from benchmarks.served import Served
from benchmarks.watch import Watch
from benchmarks.workload import Workload
from mora_serve.v1 import generation_pb2 as pb

TENANTS = ("one", "two")  # half of the load is each one's
OUT_OF_IT = 1.5  # answers' time that no rate counts, at the beginning


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--capacity-seconds", type=float, default=30.0)
    parser.add_argument("--times", type=float, default=10.0, help="the capacity, as load")
    parser.add_argument("--deadline", type=float, default=3.0, help="in times of an answer")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="of the engine; 0: all cores")
    parser.add_argument("--seed", type=int, default=0)
    Workload.add_arguments(parser)
    parser.set_defaults(hidden=512, intermediate=1408, layers=6, vocabulary=4096, tokens=128)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args)
    report.emit({**result, "arguments": vars(args), "environment": report.environment()})


def measure(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The capacity, then the overload."""
    work = Workload.of(args)
    work.write_base(root / "base")
    payloads = tuple(map(payload, requests(work)))
    file = root / "access.toml"
    keys = [add_key(file, tenant, tenant) for tenant in TENANTS]
    flags = {
        "engine.max_batch": args.batch,
        "engine.threads": args.threads,
        "access.file": file,
    }
    with Served(root, (), flags) as served:
        closed = [
            Flow(key, payloads, key=key, callers=args.batch, seconds=args.capacity_seconds)
            for key in keys
        ]
        asked, _ = run(served.address, closed)
        callers = sum(flow.callers for flow in closed)
        capacity = saturated(_all(asked), callers, args.capacity_seconds)
        answer = args.batch / capacity
        report.log(f"capacity {capacity:.2f} answers/s, {answer:.2f} s each in a full batch")
        deadline = args.deadline * answer
        due = poisson(args.times * capacity, args.seconds, random.Random(args.seed))
        flood = [
            Flow(key, payloads, key=key, due=tuple(due[i :: len(keys)]), deadline=deadline)
            for i, key in enumerate(keys)
        ]
        with Watch(served.pid, served.address) as watch:
            asked, generator_cpu = run(served.address, flood)
        answers = _all(asked)
        after, _ = run(served.address, [Flow("after", payloads, key=keys[0], due=(0.0,))])
    goodput = steady(answers, OUT_OF_IT * answer, args.seconds, deadline)
    wrong = untyped(answers)
    health = percentiles([ms / 1e3 for ms in watch.health_ms])
    refused = [a for a in answers if a.code == "RESOURCE_EXHAUSTED"]
    late = sum(a.code == "DEADLINE_EXCEEDED" for a in answers)
    result = {
        "capacity_per_second": capacity,
        "answer_seconds": answer,
        "deadline_seconds": deadline,
        "offered_per_second": len(due) / args.seconds,
        "offered_over_capacity": len(due) / args.seconds / capacity,
        "goodput_per_second": goodput,
        "goodput_over_capacity": goodput / capacity,
        "requests": len(answers),
        "ended": counts(answers),
        "late": late,
        "late_over_answered": late / max(1, len(answers) - len(refused)),
        "refusals": len(refused),
        "refused_after_ms": percentiles([a.ended - a.sent for a in refused]),
        "sent_late_ms": percentiles([a.sent - a.due for a in answers]),
        "untyped": len(wrong),
        "what_untyped": wrong[:10],
        "health_ms": health,
        "health_checks": len(watch.health_ms),
        "unhealthy": watch.unhealthy,
        "resident_growth": watch.growth(after=args.seconds / 4, over=args.seconds / 6),
        "resident_bytes": watch.samples[-1].resident,
        "most_descriptors": max(s.descriptors for s in watch.samples),
        "server_cpu_seconds": watch.cpu_seconds,
        "generator_cpu_seconds": generator_cpu,
        "served_after": after["after"][0].code == "OK",
    }
    report.log(f"goodput {goodput:.2f} of {capacity:.2f} answers/s; {result['ended']}")
    report.log(f"health {health}; memory {result['resident_growth']:+.2%}")
    report.log(
        f"seconds of processor: generator {generator_cpu:.1f}, server {watch.cpu_seconds:.1f}"
    )
    return result


def _all(asked: Mapping[str, Sequence[Answer]]) -> list[Answer]:
    return [answer for answers in asked.values() for answer in answers]


def requests(work: Workload) -> list[pb.GenerateRequest]:
    """Prompts of random tokens that are answered by the base in full length."""
    return [
        pb.GenerateRequest(
            prompt=pb.Prompt(token_ids=pb.TokenIds(ids=ids)),
            selection=pb.Selection(base=pb.BaseOnly()),
            sampling=pb.SamplingParams(max_tokens=work.tokens, ignore_eos=True),
        )
        for ids in work.prompts(64, 0)
    ]


if __name__ == "__main__":
    main()
