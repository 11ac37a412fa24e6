"""What follows the registry: pins that stay exactly as long as somebody wants them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from mora_serve.adapters.registry import Registry
from mora_serve.errors import ResourceExhausted
from mora_serve.server.follow import Pins
from tests.adapters.make import LIMITS, SHAPE, adapter
from tests.adapters.stores import memory_url, opened, stalled


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


@pytest.fixture
def fetching():
    with ThreadPoolExecutor(1) as executor:
        yield executor


def test_a_reservation_ends_where_no_record_is_pinned(registry, fetching):
    """Because recording it failed, or recorded another content."""
    slots = Slots()
    pins = Pins(slots, registry, fetching)
    with pytest.raises(RuntimeError), pins.reserved("a" * 64):
        raise RuntimeError
    assert slots.pinned == set()
    old, _ = registry.register("default", "a", adapter(1))
    with pins.reserved(old.digest):
        new, _ = registry.register("default", "a", adapter(2), replace=True)
        registry.pin("default", "a", True)
        assert slots.pinned == {old.digest, new.digest}
    assert slots.pinned == {new.digest}


def test_a_reservation_stays_where_its_record_is_pinned(registry, fetching):
    slots = Slots()
    pins = Pins(slots, registry, fetching)
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


def test_of_two_reservations_one_may_fail(registry, fetching):
    slots = Slots()
    pins = Pins(slots, registry, fetching)
    record, _ = registry.register("default", "a", adapter(1))
    with pins.reserved(record.digest):
        with pytest.raises(RuntimeError), pins.reserved(record.digest):
            raise RuntimeError
        assert slots.pinned == {record.digest}
    assert slots.pinned == set()


def test_what_another_server_pins_is_fetched_before_the_engine_is_told(fetching):
    url, slots = memory_url(), Slots()
    with opened(url) as ours, opened(url) as theirs:
        Pins(slots, theirs, fetching)
        ours.register("default", "a", adapter(1))
        theirs.poll()
        ours.pin("default", "a", True)
        with stalled(theirs, "get_file") as store:
            theirs.poll()
            store.wait_for(1)
            assert not slots.pinned
        fetching.submit(int).result(60)
        assert slots.pinned == {adapter(1).digest}
        assert theirs.here(adapter(1).digest)


def test_where_the_engine_is_elsewhere_a_pin_is_told_at_once_and_nothing_is_fetched():
    url, slots = memory_url(), Slots()
    with opened(url) as ours, opened(url) as theirs:
        Pins(slots, theirs, None)
        ours.register("default", "a", adapter(1))
        ours.pin("default", "a", True)
        theirs.poll()
        assert slots.pinned == {adapter(1).digest}
        assert not theirs.here(adapter(1).digest)
