"""The comparison with transformers and PEFT: the same work for all, and figures from its rows."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import throughput, turns
from benchmarks.peers import MODES, Peers
from benchmarks.throughput import (
    adapters_of,
    cut,
    figures,
    own_figures,
    own_turns,
    peer_ratios,
    peers_of,
    size,
)
from benchmarks.turns import OURS, System, Work, take_turns
from benchmarks.workload import Mixtures, Run, Workload, latencies, mixtures


def run_of(*times: list[float]) -> Run:
    return Run([[7] * len(t) for t in times], times)


def test_a_rate_counts_until_the_last_request_has_its_tokens() -> None:
    run = run_of([1.0, 2.0, 3.0], [0.5, 2.5, 4.0])
    assert run.rate() == pytest.approx(6 / 4.0)
    assert run.rate(1) == pytest.approx(2 / 1.0)
    assert run.first_token == [1.0, 0.5]


def test_tokens_of_one_message_are_one_gap() -> None:
    run = run_of([1.0, 1.0, 3.0])
    assert run.gaps == [2.0]
    assert latencies([run])["inter_token_ms"]["max"] == pytest.approx(2000.0)


def test_an_answer_that_is_not_whole_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"\[2\] tokens, not 3"):
        run_of([1.0, 2.0]).check(3)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 4))
def test_mixtures_are_over_the_active_adapters(requests: int, active: int, size: int) -> None:
    size = min(size, active)
    made = mixtures(requests, active, size)
    assert [len(m) for m in made] == [size] * requests
    assert len({name for m in made for name in m}) <= active
    if requests >= active and size:
        assert len({name for m in made for name in m}) == active


def test_two_adapter_mixtures_are_over_as_many_adapters_as_distinct_ones() -> None:
    def names(kind: str) -> set[str]:
        return {name for m in adapters_of(kind, 16) for name in m}

    assert names("mixtures") == names("distinct")
    assert [names(kind) for kind in ("none", "one")] == [set(), {"a0"}]
    assert adapters_of("mixtures", 1) == [{"a0": 1.0, "a1": 1.0}]


def test_prompts_are_new_in_each_turn_and_the_same_for_all() -> None:
    work = Workload()
    assert work.prompts(2, 0) == work.prompts(2, 0)
    assert work.prompts(2, 0) != work.prompts(2, 1)
    assert [len(p) for p in work.prompts(3, 0)] == [32] * 3


@pytest.mark.parametrize(("first_step", "left"), [(0.1, 64), (5.0, 128), (50.0, 256)])
def test_a_peers_answers_are_cut_only_where_its_rate_stays(first_step: float, left: int) -> None:
    """A slow first step weighs more on short answers: the slower, the more tokens are needed."""
    times = [first_step + 0.9 * i for i in range(256)]
    system = System("peer", lambda *_: run_of(times), runs=[run_of(times)], tokens=256)
    cut(system, 0.03)
    assert system.tokens == left
    assert abs(run_of(times).rate(left) / run_of(times).rate() - 1) <= 0.03
    assert set(system.whole) == {"64", "128", "256"}


def test_a_cut_peers_rate_is_that_of_its_whole_answer() -> None:
    """Times what the first run's was to its own until the cut; ours beside it is whole."""
    mine = System(OURS, lambda *_: run_of([]), runs=[run_of([i + 1.0 for i in range(256)])])
    mine.tokens = 256
    first = [1.0 + 0.9 * i for i in range(256)]
    peer = System("peer", lambda *_: run_of([]), runs=[run_of(first)], tokens=256)
    cut(peer, 0.03)
    assert peer.tokens == 64
    peer.runs += [run_of([2 * t for t in first[:64]])] * 2
    found = turns.row({}, peer, mine)
    whole = 256 / first[-1]
    assert found["most"] == pytest.approx(whole)
    assert found["tokens_per_second"] == pytest.approx(whole / 2)
    assert found["ours_until_there"] == pytest.approx(1.0)
    assert found["inter_token_ms"]["max"] == pytest.approx(1800)
    shorter = System("other", lambda *_: run_of([]), runs=[run_of(first[:64])], tokens=64)
    assert turns.row({}, shorter, mine)["ours_until_there"] == pytest.approx(1.0)


def test_systems_take_turns_on_the_same_prompts_and_a_peer_may_fail() -> None:
    order: list[tuple[str, int]] = []

    def works(name: str) -> Work:
        def work(prompts: Sequence[Sequence[int]], _: Mixtures, tokens: int) -> Run:
            order.append((name, prompts[0][0]))
            return run_of([float(i + 1) for i in range(tokens)])

        return work

    def fails(*_: object) -> Run:
        raise ValueError("no such kernel")

    ours, peer = System(OURS, works("ours"), 3, 8), System("peer", works("peer"), 2, 8)
    broken = System("broken", fails, 2, 8)
    take_turns([ours, peer, broken], Workload(), [{}])
    warm, turns = order[:2], order[2:]
    assert [name for name, _ in turns] == ["ours", "peer", "ours", "peer", "ours"]
    assert turns[0][1] == turns[1][1] != turns[2][1]
    assert warm[0][1] not in {prompt for _, prompt in turns}
    assert (broken.failure, broken.runs) == ("ValueError: no such kernel", [])
    with pytest.raises(ValueError, match="no such kernel"):
        take_turns([System(OURS, fails)], Workload(), [{}])


@pytest.mark.parametrize(
    ("name", "count", "repeat", "peer_repeat", "expected"),
    [
        (OURS, 16, 5, None, (5, 256)),
        ("transformers generate", 16, 5, None, (5, 256)),
        ("transformers generate", 16, 5, 1, (1, 256)),
        ("transformers generate", 64, 5, None, (1, 64)),
        ("PEFT one adapter set", 16, 5, None, (1, 64)),
        (OURS, 64, 5, 1, (3, 64)),
        (OURS, 1, 2, 1, (2, 256)),
    ],
)
def test_claimed_cells_are_longer_and_measured_more_often(
    name: str, count: int, repeat: int, peer_repeat: int | None, expected: tuple[int, int]
) -> None:
    system = System(name, lambda *_: run_of([]))
    args = argparse.Namespace(repeat=repeat, peer_repeat=peer_repeat, tokens=256, other_tokens=64)
    size(system, count, args)
    assert (system.repeat, system.tokens) == expected


def test_peft_is_asked_for_as_many_distinct_adapters_as_it_has(tmp_path: Path) -> None:
    peers = Peers(tmp_path, Workload(), ["a0", "a1", "a2", "a3"])  # loaded when it is asked

    def names(kind: str, count: int) -> list[str]:
        return [system.name for system in peers_of(peers, kind, count)]

    assert names("distinct", 4) == ["PEFT mixed batch", "PEFT one after another"]
    assert names("distinct", 5) == names("mixtures", 4) == []
    assert "PEFT mixed batch" in names("one", 64)
    assert "transformers generate" in names("none", 64)


def row(kind: str, count: int, system: str, rate: float) -> dict[str, object]:
    return {"adapters": kind, "requests": count, "system": system, "tokens_per_second": rate}


def test_figures_are_ratios_of_the_cells_that_were_measured() -> None:
    rows = [
        row("none", 16, OURS, 600.0),
        row("none", 16, "transformers generate", 200.0),
        row("distinct", 16, OURS, 480.0),
        row("distinct", 16, "PEFT mixed batch", 80.0),
    ]
    assert figures(rows) == pytest.approx(
        {
            "distinct_16_over_peft": 6.0,
            "none_16_over_generate": 3.0,
        }
    )
    assert figures([{"adapters": "none", "requests": 16, "system": OURS, "failure": "no"}]) == {}


def test_ours_against_ours_is_by_turns() -> None:
    """A machine that gets slower slows all kinds of a turn; the median of the turns counts."""
    kinds, asked = ["none", "one", "distinct", "mixtures"], []

    def work(prompts: Sequence[Sequence[int]], wanted: Mixtures, tokens: int) -> Run:
        kind = next(k for k in kinds if adapters_of(k, 16) == wanted)
        asked.append((kind, prompts[0][0]))
        return Run([[0] * tokens] * 16, [[2.0] * tokens] * 16)

    rates = own_turns(work, Workload(), kinds, 16, 3, 4)
    assert [kind for kind, _ in asked] == [*kinds, *kinds[::-1], *kinds]
    assert len({prompt for _, prompt in asked}) == 3
    assert rates == {kind: [32.0] * 3 for kind in kinds}
    rates = {"none": [4.0, 2.0, 1.0], "one": [3.6, 1.8, 0.5], "distinct": [3.2, 1.6, 0.8]}
    assert own_figures(rates) == pytest.approx(
        {"distinct_16_over_none": 0.8, "one_16_over_none": 0.9}
    )
    assert own_figures({"none": [], "one": []}) == {}


def test_peers_are_held_to_earlier_ratios() -> None:
    generate, peft = "transformers generate", "PEFT mixed batch"
    rows = [
        row("none", 16, generate, 638.0),
        row("one", 16, peft, 502.0),
        row("distinct", 16, peft, 138.0),
        row("none", 1, generate, 160.0),
    ]
    ratios = peer_ratios(rows)
    assert ratios["deviation"] == pytest.approx(
        {"generate": 0.0, "one": 0.0, "distinct": -0.25, "generate at 1": 0.0}
    )
    assert ratios["largest_deviation"] == pytest.approx(0.25)
    assert peer_ratios(rows[1:]) == {}


SIZES = {"hidden": 128, "intermediate": 192, "layers": 2, "vocabulary": 320, "rank": 4}
SMALL = [f"--{k}={v}" for k, v in {**SIZES, "prompt": 8, "tokens": 6, "repeat": 1}.items()]


def test_peers_run_only_where_they_are_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["throughput", "--json", "--kinds", "none", "--requests", "1", "2", *SMALL]
    command += ["--other-tokens", "4", "--own", "0", "--peer-requests", "1"]
    monkeypatch.setattr(sys, "argv", command)
    throughput.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert sorted(r["requests"] for r in rows if r["system"] == OURS) == [1, 2]
    assert {r["requests"] for r in rows if r["system"] != OURS} == {1}


def test_all_systems_do_the_same_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours over gRPC and every peer answer a small base's prompts, nearly always alike."""
    command = ["throughput", "--json", "--requests", "1", "4", "--other-tokens", "4", *SMALL]
    command += ["--own", "1"]
    monkeypatch.setattr(sys, "argv", command)
    throughput.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(r["adapters"], r["requests"], r["system"]): r for r in result["rows"]}
    assert len(rows) == 20
    assert [r.get("failure") for r in rows.values()] == [None] * 20
    alike = [r["same_first_tokens_as_ours"] for r in rows.values() if r["requests"] == 4]
    assert sum(alike) / len(alike) > 0.8
    assert result["figures"].keys() == {
        "none_1_over_generate",
        *("mixtures_16_over_distinct", "distinct_16_over_none", "one_16_over_none"),
    }
    assert {len(rates) for rates in result["own"].values()} == {1}
    for r in rows.values():
        assert (r["ours_until_there"] == r["tokens_per_second"]) == (r["system"] == OURS)
    settings = result["peers"]["settings"]
    assert len(settings["chosen"]) == 2
    for name, mode in settings["chosen"].items():
        kind, requests = name.split(", ")
        steps = {f"{kind}, {m.cache} cache, {m.attention}, {requests}": m for m in MODES}
        fastest = min(steps, key=settings["step_ms"].__getitem__)
        assert mode == dataclasses.asdict(steps[fastest])
