"""One function of static buffers: called on the CPU, captured and replayed on a card."""

from __future__ import annotations

import pytest
import torch

from mora_serve.engine.graphs import WARM_UPS, Graphs, Variant

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_computes_what_is_in_the_buffers_now(device: str) -> None:
    calls: list[Variant] = []
    x, y = torch.ones(4, device=device), torch.zeros(4, device=device)

    def work(variant: Variant) -> None:
        calls.append(variant)
        y[: variant.rows] = x[: variant.rows] * (1 + variant.tile_rows)

    graphs = Graphs(work, torch.device(device))
    graphs.prepare(Variant(2))
    captured = len(calls)
    assert captured == (0 if device == "cpu" else WARM_UPS + 1)
    for value in (3.0, 5.0):
        x.fill_(value)
        graphs.run(Variant(2))
        assert y.tolist() == [value, value, 0, 0]
    assert len(calls) == captured + (2 if device == "cpu" else 0)
    graphs.run(Variant(3, tile_rows=16))
    assert y.tolist() == [85, 85, 85, 0]


@pytest.mark.gpu
def test_a_graph_that_does_not_read_newer_scales_is_thrown_away() -> None:
    calls: list[Variant] = []
    x = torch.zeros(4, device="cuda")

    def work(variant: Variant) -> None:
        calls.append(variant)
        x.add_(1)

    graphs = Graphs(work, torch.device("cuda"))
    for variant in (Variant(1), Variant(1, 1), Variant(1, 1, 7), Variant(1, 1), Variant(1)):
        graphs.run(variant)
    assert calls.count(Variant(1)) == WARM_UPS + 1
    assert calls.count(Variant(1, 1)) == 2 * (WARM_UPS + 1)
