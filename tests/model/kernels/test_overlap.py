"""Whether launches overlap: decided by results and times, which the tests hand in.

The overlap itself is of cards from Hopper on; here both kinds of launches are the plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mora_serve.model.int8_slots import Int8Slots
from mora_serve.model.kernels import overlap
from mora_serve.model.kernels.mixed_lora import KernelAdapters
from mora_serve.model.lora import AdapterSlots
from mora_serve.model.shape import ModelShape

SHAPE = ModelShape("llama", 32, 16, 24, 1, 2, 1, 8, 64, 1e-6)


class Plain(KernelAdapters):
    """Launches as they are without ``early``; says what it was asked for."""

    asked: list[bool] = []  # noqa: RUF012 - emptied by the fixture
    wrong_at = -1  # of the calls with ``early``, the one that adds something else

    def __init__(self, slots: Any, buffers: Any, early: bool = False) -> None:
        super().__init__(slots, buffers)
        self.early, self.calls = early, 0
        self.asked.append(early)

    def apply(self, layer: int, site: str, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        if self.early and self.calls == self.wrong_at:
            y += 1
        return super().apply(layer, site, x, y)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "KernelAdapters", Plain)
    monkeypatch.setattr(overlap, "ROWS", 1)
    monkeypatch.setattr(overlap, "TURNS", 1)
    Plain.asked.clear()
    Plain.wrong_at = -1


def slots(device: torch.device) -> AdapterSlots:
    return AdapterSlots(SHAPE, 3, 2, torch.float32, device)


def clock(*times: float) -> Callable[[Callable[[], object]], float]:
    left = list(times)

    def seconds(work: Callable[[], object]) -> float:
        work()
        return left.pop(0)

    return seconds


@pytest.mark.parametrize(("early", "pays"), [(1.0, True), (2.0, False)])
def test_the_faster_of_two_that_agree_is_taken(early: float, pays: bool, device: torch.device):
    """And the slots are as empty as they were, in whichever form."""
    made = Int8Slots.of(SHAPE, slots(device)) if pays else slots(device)
    assert overlap.tried(made, clock(2.0, early)) is pays
    assert Plain.asked == [False, True]
    assert made.ranks == [0, 0, 0]
    for sites in made.layers:
        for parts in sites.values():
            assert not any(part.a.any() or part.b.any() for part in parts)


@pytest.mark.parametrize("call", [4, 8])
def test_other_results_are_not_taken_however_fast(call: int, device: torch.device):
    """Be it of the first runs, or of those that are timed."""
    Plain.wrong_at = call
    assert not overlap.tried(slots(device), clock(2.0, 1.0))


def test_slots_that_hold_adapters_are_left_alone(device: torch.device):
    made = slots(device)
    made.ranks[1] = 2
    made.layers[0]["o"][0].a[1] = 7.0
    with pytest.raises(ValueError, match="adapters in the slots"):
        overlap.tried(made, clock())
    assert made.ranks == [0, 2, 0]
    assert bool((made.layers[0]["o"][0].a[1] == 7.0).all())


def test_what_cannot_is_off(monkeypatch: pytest.MonkeyPatch, device: torch.device):
    """A card that is too old, none at all, or launches that fail."""
    if device.type != "cuda":
        assert not overlap.overlap_pays(slots(device), clock())

    class Card:
        type = "cuda"

    class Empty:
        device, ranks = Card(), [0]

    def broken(slots: Any, seconds: Any) -> bool:
        raise RuntimeError("no such launch attribute")

    empty: Any = Empty()
    monkeypatch.setattr(overlap, "tried", lambda slots, seconds: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert not overlap.overlap_pays(empty, clock())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert overlap.overlap_pays(empty, clock())
    monkeypatch.setattr(overlap, "tried", broken)
    assert not overlap.overlap_pays(empty, clock())


@pytest.mark.gpu
def test_a_card_measures_it(monkeypatch: pytest.MonkeyPatch):
    """Whatever comes out: nothing raises, and the slots are empty."""
    from mora_serve.model.kernels.products import card_seconds

    monkeypatch.undo()
    if torch.cuda.get_device_capability() < overlap.CAPABILITY:
        pytest.skip("this card has no early launches")
    made = AdapterSlots(SHAPE, 3, 16, torch.bfloat16, torch.device("cuda"))
    assert overlap.tried(made, card_seconds) in (True, False)
    assert made.ranks == [0, 0, 0]
