"""Overheads: what streaming, routing, start-up and memory are measured by."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import footprint, overhead
from benchmarks.workload import Workload

SMALL = Workload(hidden=128, intermediate=192, layers=2, vocabulary=320, prompt=8, tokens=6, rank=4)


def test_both_ways_are_measured_on_the_same_engine(tmp_path: Path) -> None:
    found = overhead.streaming(tmp_path, SMALL, streams=3, repeat=2)
    for kind in ("none", "distinct"):
        ways = found[kind]
        assert len(ways["runs"]["streamed"]) == len(ways["runs"]["in_process"]) == 2
        assert ways["lost"] == pytest.approx(1 - ways["streamed"] / ways["in_process"])
    assert found["most_lost"] == max(found[kind]["lost"] for kind in ("none", "distinct"))


def test_routed_and_given_answers_come_in_pairs(tmp_path: Path) -> None:
    found = overhead.routing(tmp_path, adapters=20, pairs=6)
    assert found["sources"]
    assert set(found["sources"]) <= {"router", "abstained"}
    low, middle, high = found["first_token_ms_quartiles"]
    assert low <= middle == found["first_token_ms"] <= high


def test_a_start_ends_with_a_whole_answer() -> None:
    found = footprint.startup(1)
    assert found["all"] == [found["first"]] == [found["seconds"]]


def test_memory_is_told_by_part(tmp_path: Path) -> None:
    found = footprint.memory_by_part(tmp_path, SMALL, requests=2)
    sizes = found["bytes"]
    a_slot = 2 * sum(  # bf16 or fp32 numbers of both matrices, of all seven projections
        SMALL.rank * (rows + columns) * SMALL.layers
        for rows, columns in ((128, 128), (128, 128), (64, 128), (64, 128))
    )
    assert sizes["32 adapter slots"] >= 32 * a_slot
    assert found["a_slot"] == sizes["32 adapter slots"] // 32
    assert all(size > 0 for size in sizes.values())
    assert found["server_resident_bytes"] > sizes["base, 4-bit linears"]


def test_resident_memory_is_the_kernels() -> None:
    mine = footprint.resident(os.getpid())
    assert set(mine) == {"anonymous", "file", "shared"}
    assert mine["anonymous"] > 1 << 20
