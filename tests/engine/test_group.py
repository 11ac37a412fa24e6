"""Ranks that agree, by gloo between threads of this process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from mora_serve.engine.graphs import Graphs, Variant
from mora_serve.engine.group import RankGroup
from tests.engine.faults import FaultyCapture

R = TypeVar("R")
CPU = torch.device("cpu")


def by_ranks(path: Path, work: Callable[[RankGroup], R]) -> list[R]:
    """What each of two ranks' work gives."""
    with ThreadPoolExecutor(2) as pool:
        ranks = [
            pool.submit(lambda rank=rank: work(RankGroup(rank, 2, CPU, path, 60.0)))  # type: ignore[misc]
            for rank in range(2)
        ]
        return [rank.result(120) for rank in ranks]


def test_all_can_what_each_can_and_count_alike_afterwards(tmp_path: Path) -> None:
    """A rank that broke off has begun fewer sums than another."""

    def work(group: RankGroup) -> tuple[list[bool], int]:
        said = [group.all_can(True)]
        group.calls += group.rank
        said += [group.all_can(group.rank == 0), group.all_can(True)]
        return said, group.calls

    one, two = by_ranks(tmp_path / "ranks", work)
    assert one == two
    assert one[0] == [True, False, True]


def test_what_one_rank_cannot_capture_none_replays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """NCCL wants an operation captured by all or by none; all go on with the right sums."""

    def work(group: RankGroup) -> tuple[set[Variant], list[list[float]], int, int]:
        y = torch.zeros(3)

        def sums(variant: Variant) -> None:
            y[: variant.rows] = group.sum(torch.full((variant.rows,), 1.0 + group.rank))

        capture = FaultyCapture(
            RuntimeError("no memory"),
            lambda asked: bool(group.rank) and asked == 2,
            broken_off=True,
        )
        graphs = Graphs(sums, CPU, capture, group)
        found = []
        for rows in (1, 2, 3, 2, 1):
            y.zero_()
            graphs.run(Variant(rows))
            group.launched()
            found.append(y.tolist())
        return graphs.eager, found, capture.replayed, group.calls

    with caplog.at_level(logging.WARNING):
        one, two = by_ranks(tmp_path / "ranks", work)
    assert one == two
    assert one[0] == {Variant(2)}
    assert one[2] == 3
    assert one[1] == [[3.0] * n + [0.0] * (3 - n) for n in (1, 2, 3, 2, 1)]
    assert {r.getMessage().rpartition(": ")[2] for r in caplog.records} == {
        "no memory",
        "another rank cannot",
    }
