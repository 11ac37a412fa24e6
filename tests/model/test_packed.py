"""Small arrays in one buffer: what the device has, and when."""

from __future__ import annotations

import pytest
import torch

from mora_serve.model.packed import ALIGNMENT, Packed

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FIELDS = {
    "small": ((3,), torch.int32),
    "wide": ((2,), torch.int64),
    "real": ((5,), torch.float32),
    "table": ((4, 6), torch.int32),
}


@pytest.mark.parametrize("device", DEVICES)
def test_the_device_has_what_was_written_once_it_is_uploaded(device: str) -> None:
    packed = Packed(FIELDS, torch.device(device))
    host = packed.begin()
    host["small"][:], host["wide"][:], host["real"][:] = (1, -2, 3), (1 << 40, -(1 << 62)), 0.5
    host["table"][:] = 7
    before = {name: t.clone().cpu() for name, t in packed.device.items()}
    packed.upload()
    assert all(not t.any() for t in before.values())
    assert packed.device["small"].tolist() == [1, -2, 3]
    assert packed.device["wide"].tolist() == [1 << 40, -(1 << 62)]
    assert packed.device["real"].tolist() == [0.5] * 5
    assert packed.device["table"].tolist() == [[7] * 6] * 4


@pytest.mark.parametrize("device", DEVICES)
def test_of_the_last_field_as_many_rows_go_as_are_asked_for(device: str) -> None:
    packed = Packed(FIELDS, torch.device(device))
    for array in packed.begin().values():
        array[:] = 1
    packed.upload(2)
    assert packed.device["table"].sum(1).tolist() == [6, 6, 0, 0]
    assert packed.device["real"].tolist() == [1.0] * 5


@pytest.mark.parametrize("device", DEVICES)
def test_another_receives_all_but_the_last_field_and_a_corner_of_that(device: str) -> None:
    """What lies beyond the corner is as it was, here and on the device."""
    one, two = (Packed(FIELDS, torch.device(device)) for _ in range(2))
    for value, array in enumerate(one.begin().values(), 1):
        array[:] = value
    two.begin()["table"][:] = 9
    two.receive(one.image(2, 3), 2, 3)
    assert two.device["small"].tolist() == [1] * 3
    assert two.device["wide"].tolist() == [2] * 2
    assert two.device["real"].tolist() == [3.0] * 5
    assert two.device["table"].tolist() == [[4] * 3 + [9] * 3] * 2 + [[0] * 6] * 2
    assert two.begin()["table"].tolist() == [[4] * 3 + [9] * 3] * 2 + [[9] * 6] * 2


def test_tensors_stay_where_they_are_and_are_aligned() -> None:
    packed = Packed(FIELDS, torch.device("cpu"))
    places = {name: t.data_ptr() for name, t in packed.device.items()}
    packed.begin()["small"][:] = 4
    packed.upload()
    assert places == {name: t.data_ptr() for name, t in packed.device.items()}
    first = min(places.values())
    assert all((p - first) % ALIGNMENT == 0 for p in places.values())
    assert packed.nbytes % 4 == 0
