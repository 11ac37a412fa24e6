"""One function of static buffers: called on the CPU, captured and replayed on a card."""

from __future__ import annotations

import logging

import pytest
import torch

from mora_serve.engine.graphs import WARM_UPS, CardCapture, Graphs, Variant
from tests.engine.faults import FaultyCapture

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# What torch raises where a step cannot be captured, or there is no memory left to capture it in.
REFUSALS = [
    torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing\nmore"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("beginAllocateToPool: already recording to mempool_id"),
]


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
    assert not graphs.eager


@pytest.mark.parametrize("error", REFUSALS)
def test_what_cannot_be_captured_runs_as_it_is(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once, and not tried again; other variants keep their graphs."""
    x, y = torch.ones(4), torch.zeros(4)

    def work(variant: Variant) -> None:
        y[: variant.rows] = x[: variant.rows]

    capture = FaultyCapture(error, lambda asked: asked == 2)
    graphs = Graphs(work, torch.device("cpu"), capture)
    with caplog.at_level(logging.WARNING):
        for value in (2.0, 3.0, 4.0):
            x.fill_(value)
            for rows in (1, 2, 3):
                y.zero_()
                graphs.run(Variant(rows))
                assert y.tolist() == [value] * rows + [0.0] * (4 - rows)
    assert capture.asked == 3
    assert graphs.eager == {Variant(2)}
    (record,) = caplog.records
    said = record.getMessage()
    assert "Variant(rows=2, tile_rows=0)" in said
    assert f"{type(error).__name__}: {str(error).splitlines()[0]}" in said
    assert "\n" not in said


def test_work_that_fails_by_itself_is_no_failed_capture() -> None:
    """Its error is the step's, and the next step captures."""
    broken = True

    def work(variant: Variant) -> None:
        if broken:
            raise torch.OutOfMemoryError("of the step")

    capture = FaultyCapture(RuntimeError(), lambda _: False)
    graphs = Graphs(work, torch.device("cpu"), capture)
    for call in (graphs.prepare, graphs.run):
        with pytest.raises(torch.OutOfMemoryError):
            call(Variant(1))
    broken = False
    graphs.run(Variant(1))
    assert capture.asked == 1
    assert not graphs.eager


@pytest.mark.gpu
def test_on_a_card_what_cannot_be_captured_runs_between_graphs() -> None:
    """Waiting for the device is what a capture does not allow."""
    device = torch.device("cuda")
    x = torch.zeros(1, device=device)

    def work(variant: Variant) -> None:
        x.add_(1)
        if variant.rows == 2:
            x.item()

    graphs = Graphs(work, device, CardCapture(device))
    for rows in (1, 2, 3, 2):
        graphs.prepare(Variant(rows))
        x.zero_()
        for _ in range(3):
            graphs.run(Variant(rows))
        assert x.item() == 3
    assert graphs.eager == {Variant(2)}
