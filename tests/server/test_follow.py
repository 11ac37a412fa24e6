"""What follows the registry: pins that stay exactly as long as somebody wants them."""

from __future__ import annotations

import pytest

from mora_serve.adapters.registry import Registry
from mora_serve.errors import ResourceExhausted
from mora_serve.server.follow import Pins
from tests.adapters.make import LIMITS, SHAPE, adapter


class Slots:
    """The pinned contents, at most two."""

    def __init__(self) -> None:
        self.pinned: set[str] = set()

    def pin(self, digest: str) -> None:
        if digest not in self.pinned and len(self.pinned) == 2:
            raise ResourceExhausted("pinned: no more")
        self.pinned.add(digest)

    def unpin(self, digest: str) -> None:
        self.pinned.discard(digest)


@pytest.fixture
def registry():
    with Registry(None, LIMITS, SHAPE) as registry:
        yield registry


def test_a_reservation_ends_where_no_record_is_pinned(registry):
    """Because recording it failed, or recorded another content."""
    slots = Slots()
    pins = Pins(slots, registry)
    with pytest.raises(RuntimeError), pins.reserved("a" * 64):
        raise RuntimeError
    assert slots.pinned == set()
    old, _ = registry.register("default", "a", adapter(1))
    with pins.reserved(old.digest):
        new, _ = registry.register("default", "a", adapter(2), replace=True)
        registry.pin("default", "a", True)
        assert slots.pinned == {old.digest, new.digest}
    assert slots.pinned == {new.digest}


def test_a_reservation_stays_where_its_record_is_pinned(registry):
    slots = Slots()
    pins = Pins(slots, registry)
    record, _ = registry.register("default", "a", adapter(1))
    for _ in range(2):  # a pinned one can be pinned again
        with pins.reserved(record.digest):
            registry.pin("default", "a", True)
        assert slots.pinned == {record.digest}
    with pytest.raises(RuntimeError), pins.reserved(record.digest):
        raise RuntimeError
    assert slots.pinned == {record.digest}
    registry.pin("default", "a", False)
    assert slots.pinned == set()


def test_of_two_reservations_one_may_fail(registry):
    slots = Slots()
    pins = Pins(slots, registry)
    record, _ = registry.register("default", "a", adapter(1))
    with pins.reserved(record.digest):
        with pytest.raises(RuntimeError), pins.reserved(record.digest):
            raise RuntimeError
        assert slots.pinned == {record.digest}
    assert slots.pinned == set()
