"""``benchmarks.cluster_simulator``: a replica modelled after the engine, and many of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import cluster_reality, cluster_report, cluster_simulator
from benchmarks.cluster_model import Cluster, simulate, zipf_trace
from benchmarks.cluster_reality import Work
from benchmarks.open_loop import Outcome
from benchmarks.replica_model import Job, Limits, Profile, Tables, between
from mora_serve.cluster.policy import ROUTINGS, Routing

PROFILE = Profile(
    step={1: 0.002, 8: 0.004}, prompt_token=0.0001, beside={0: [0.001]}, load=0.01, first_load=0.03
)


def play(jobs: list[Job], **limits: Any) -> Cluster:
    cluster = Cluster(1, PROFILE, Limits(**limits), "random")
    cluster.run(jobs)
    return cluster


def test_a_first_token_takes_the_load_the_prompt_a_step_and_the_way() -> None:
    job = Job(1.0, 0, 64, 11)
    play([job])
    assert job.first_token - job.due == pytest.approx(0.03 + 0.0064 + 0.002 + 0.001)
    assert job.ended - job.due == pytest.approx(0.03 + 0.0064 + 0.002 + 10 * 0.002)


def test_loads_come_one_after_another_and_delay_nobody_else() -> None:
    streaming, *others = jobs = [Job(0.0, 0, 16, 101), Job(0.1, 1, 16, 1), Job(0.1, 2, 16, 1)]
    play(jobs)
    assert streaming.ended < 0.3
    one, two = (job.first_token - job.due for job in others)
    assert one == pytest.approx(0.03, abs=0.01)
    assert two == pytest.approx(0.06, abs=0.01)


def test_the_least_recently_used_adapter_makes_room_and_one_in_use_does_not() -> None:
    jobs = [Job(t, a, 16, 1) for t, a in ((0, 0), (1, 1), (2, 0), (3, 2), (4, 0), (5, 1))]
    cluster = play(jobs, slots=2)
    assert (cluster.replicas[0].hits, cluster.replicas[0].loads) == (2, 4)
    held = [Job(0.0, 0, 16, 500), Job(0.1, 1, 16, 1)]
    play(held, slots=1)
    assert held[1].first_token > held[0].ended


def test_an_adapter_in_the_hosts_memory_loads_faster() -> None:
    jobs = [Job(t, a, 16, 1) for t, a in ((0, 0), (1, 1), (2, 0))]
    play(jobs, slots=1)
    assert jobs[0].first_token - jobs[2].first_token + 2 == pytest.approx(0.02)
    cold = [Job(t, a, 16, 1) for t, a in ((0, 0), (1, 1), (2, 0))]
    play(cold, slots=1, host=1)
    assert cold[0].first_token + 2 == pytest.approx(cold[2].first_token)


def test_who_waited_for_a_load_has_the_waits_measured_of_such() -> None:
    profile = replace(PROFILE, missed=(0.1,), first_missed=(0.2,))
    jobs = [Job(t, a, 16, 1) for t, a in ((0, 0), (1, 0), (2, 1), (3, 0))]
    cluster = Cluster(1, profile, Limits(slots=1), "random")
    cluster.run(jobs)
    steps = 0.0016 + 0.002
    waits = [job.first_token - job.due - steps for job in jobs]
    assert waits == pytest.approx([0.03 + 0.2, 0.001, 0.03 + 0.2, 0.01 + 0.1])


def test_who_is_passed_over_for_long_gets_the_next_slot() -> None:
    streams = [Job(0.01 * i, 0, 16, 40) for i in range(100)]
    other = Job(0.05, 1, 16, 1)
    play(sorted([*streams, other], key=lambda job: job.due), slots=1, max_batch=8)
    assert other.first_token < streams[-1].first_token


def test_a_full_line_refuses() -> None:
    jobs = [Job(0.0, 0, 16, 4) for _ in range(9)]
    play(jobs, max_queue=5)
    assert sum(job.refused for job in jobs) == 4


TRACES = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 9), st.integers(1, 300), st.integers(1, 40)),
    min_size=1,
    max_size=60,
)


@settings(deadline=None)
@given(TRACES, st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.sampled_from(ROUTINGS))
def test_every_request_is_answered_and_every_slot_given_back(
    trace: list[tuple[float, int, int, int]],
    replicas: int,
    slots: int,
    batch: int,
    routing: Routing,
) -> None:
    jobs = [Job(*values) for values in sorted(trace)]
    cluster = Cluster(replicas, PROFILE, Limits(slots=slots, max_batch=batch), routing)
    cluster.run(jobs)
    assert all(job.due < job.first_token <= job.ended + 0.001 + 1e-9 for job in jobs)
    assert sum(r.served for r in cluster.replicas) == len(jobs)
    assert all(not r.held() and len(r.slots) <= slots for r in cluster.replicas)
    assert all(r.hits + r.loads >= r.served for r in cluster.replicas)
    assert cluster.fleet.mean_load == 0


@given(st.lists(st.tuples(st.integers(0, 99), st.floats(0, 1)), min_size=1, max_size=5))
def test_between_goes_through_every_point(points: list[tuple[int, float]]) -> None:
    known = dict(points)
    assert all(math.isclose(between(known, x), y, abs_tol=1e-12) for x, y in known.items())


def test_prompts_beside_streams_come_in_chunks_that_keep_the_pace() -> None:
    tables = Tables(PROFILE, Limits())
    assert tables.chunk(0, 1) == 512
    assert tables.chunk(8, 1) == 30  # 0.75 of a step's 4 ms, at 0.1 ms a token
    assert tables.chunk(8, 16) == 60


def test_the_same_seed_gives_the_same_figures_and_affinity_the_most_hits() -> None:
    def figures(routing: Routing) -> dict[str, Any]:
        limits = Limits(slots=8)
        return simulate(10, 200, routing, PROFILE, limits, rate=100.0, requests=1500, warm=1500)

    affinity, two, chance = (figures(routing) for routing in ROUTINGS)
    assert affinity == figures("affinity")
    assert affinity["hit_rate"] > 1.5 * max(two["hit_rate"], chance["hit_rate"])
    assert affinity["load"] < 1.5


def test_one_server_finds_what_the_model_finds_in_its_slots() -> None:
    """Requests that do not overlap: which adapters are in slots depends on the policy alone."""
    work = Work(adapters=8, slots=4, prompt=16, output=2, rank=4, exponent=0.8, seconds=6.0, seed=3)
    trace = zipf_trace(50, 8.0, 8, 0.8, 16, 2, 3)
    for i, job in enumerate(trace):
        job.due = i / 8
    told = cluster_reality.modelled(PROFILE, work, 1, "affinity", trace)
    with cluster_reality.adapters(work) as root:
        seen = cluster_reality.real(root, work, 1, "affinity", trace)
    assert seen["requests"] == 50
    assert seen["first_token_p50_ms"] > 0
    assert seen["hit_rate"] == pytest.approx(told["hit_rate"], abs=0.05)
    assert set(cluster_reality.errors(told, seen)) < set(seen)


def test_waits_are_what_steps_do_not_explain_by_the_answers_at_work() -> None:
    work = Work(adapters=8, slots=4, prompt=16, output=2, rank=4, exponent=0.8, seconds=6.0, seed=3)
    alone, beside = (cluster_reality.modelled_first(PROFILE, work, n) for n in (0, 2))
    outcomes = [
        Outcome(i, sent=i, ended=i + 0.1, messages=[(i + alone + 0.002, 1)]) for i in range(20)
    ]
    both = [
        Outcome(100 + i, sent=100 + i, ended=100.9 + i, messages=[(100 + i + t, 1)])
        for i in range(10)
        for t in (beside + 0.01,) * 4
    ]
    for one in both[::4]:
        one.sent += 0.001  # has three beside it, that is 2 an engine when rounded
        one.due = one.sent
        one.messages = [(one.sent + beside + 0.01, 1)]
    waits = cluster_reality.waits(PROFILE, work, 2, [*outcomes, *both])
    assert set(waits) == {0, 2}
    assert waits[0][0] == pytest.approx(0.002)
    assert waits[2] == pytest.approx([0.01] * 10)


def test_the_grid_runs_from_a_stored_profile_and_is_drawn(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    stored = tmp_path / "profile.json"
    stored.write_text(json.dumps(PROFILE.as_json()))
    flags = ["--json", "--no-check", "--profile", str(stored), "--replicas", "1", "4"]
    cluster_simulator.main([*flags, "--adapters", "5", "50", "--requests", "1"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["grid"]) == 2 * 2 * len(ROUTINGS)
    assert Profile.from_json(result["profile"]) == PROFILE
    assert cluster_report.tables(result).count("\n| affinity |") == 4
    cluster_report.picture(result).savefig(tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 10_000


def test_the_largest_error_is_of_all_runs_and_figures() -> None:
    errors = [
        {"hit_rate": 0.1, "first_token_p50_ms": 0.3},
        {"hit_rate": 0.2, "first_token_p50_ms": 0},
    ]
    checks = [{"servers": n, "errors": e} for n, e in enumerate(errors, 1)]
    figures = cluster_simulator.figures(checks)
    assert figures["largest_error"] == 0.3
    assert figures["largest_error_of_clusters"] == 0.2
    assert figures["largest_errors"] == {"hit_rate": 0.2, "first_token_p50_ms": 0.3}
