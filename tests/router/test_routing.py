"""Routing follows the registry, and a router is replaced as a whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mora_serve.adapters.card import RoutingCard
from mora_serve.adapters.registry import Registry
from mora_serve.core import SHARED_TENANT
from mora_serve.errors import FailedPrecondition, InvalidArgument, Unavailable
from mora_serve.router import routing as routing_module
from mora_serve.router.routing import ROUTER_FILE, Routing, Snapshot
from tests.adapters.make import LIMITS, SHAPE, adapter
from tests.adapters.stores import memory_url, opened
from tests.router.conftest import ADAPTERS
from tests.router.make import FINGERPRINT, card, fitted, prompts

REVERSE = "reverse 'kavoja'"


def best(routing: Routing, text: str, tenant: str = "default", names=None) -> str:
    return routing.route(tenant, text, names, 1).choice.candidates[0].adapter


def names(routing: Routing, tenant: str = "default") -> set[str]:
    candidates = routing.route(tenant, REVERSE, None, 1).choice.candidates
    return {c.adapter for c in candidates}


def bits(snapshot: Snapshot, text: str, pooled=None, names=None) -> dict[str, bytes]:
    z = snapshot.router.embed(text, pooled)
    rows = snapshot.index.candidates("default", z, names, 1000)
    assert rows is not None
    return {n: c.tobytes() for n, c in zip(rows.names, rows.scores(z)[0], strict=True)}


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@contextmanager
def two(state: Path) -> Iterator[tuple[Registry, Registry]]:
    """The registries of two processes that share a state."""
    with (
        Registry(state, LIMITS, SHAPE, FINGERPRINT) as ours,
        Registry(state, LIMITS, SHAPE, FINGERPRINT) as theirs,
    ):
        yield ours, theirs


def test_without_a_router_nothing_is_picked(registry: Registry) -> None:
    routing = Routing(registry, FINGERPRINT)
    assert routing.snapshot is None
    assert routing.route("default", REVERSE, None, 2) == (((), ()), "")


def test_prompts_reach_their_adapters(routing: Routing) -> None:
    asked = [(name, text) for name in ADAPTERS for text in prompts(name, 21, 10)]
    right = [routing.route("default", text, None, 1).choice.adapters == (n,) for n, text in asked]
    assert sum(right) >= 0.95 * len(right)


def test_a_text_of_no_adapter_gets_none(routing: Routing) -> None:
    routed = routing.route("default", "Parliament confirmed the budget on Tuesday.", None, 2)
    assert routed.choice.adapters == ()
    assert routed.choice.candidates
    assert routed.router_digest == routing.snapshot.router.digest


def test_an_adapter_can_be_routed_to_when_its_registration_returns(
    registry: Registry, routing: Routing
) -> None:
    text = "spell 'kavo' letter by letter"
    before = bits(routing.snapshot, text)
    registry.register("default", "speller", adapter(9), card=card("spell"))
    assert best(routing, text) == "speller"
    after = bits(routing.snapshot, text)
    assert {n: b for n, b in after.items() if n != "speller"} == before


def test_an_adapter_removed_is_no_candidate(registry: Registry, routing: Routing) -> None:
    registry.unregister("default", "reverse")
    assert names(routing) == set(ADAPTERS) - {"reverse"}


def test_a_changed_card_changes_the_key(registry: Registry, routing: Routing) -> None:
    registry.update("default", "polite", card=card("spell"))
    assert best(routing, "spell 'kavo' letter by letter") == "polite"


def test_a_pin_changes_no_key(registry: Registry, routing: Routing) -> None:
    before = routing.snapshot
    registry.pin("default", "reverse", True)
    assert routing.snapshot is before


def test_another_tenant_is_never_seen(routing: Routing) -> None:
    assert names(routing) == set(ADAPTERS)
    assert names(routing, "other") == {"theirs"}
    assert routing.route("default", REVERSE, ["theirs"], 1).choice == ((), ())
    assert routing.route("nobody", REVERSE, None, 1).choice == ((), ())


def test_without_prompts_the_description_counts_where_the_adapter_is_named(
    registry: Registry, routing: Routing
) -> None:
    registry.register("default", "shy", adapter(9), card=RoutingCard("reverse the word"))
    registry.register("default", "mute", adapter(10))
    assert names(routing) == set(ADAPTERS)
    asked = routing.route("default", REVERSE, ["shy", "mute", "roman"], 1).choice
    assert [c.adapter for c in asked.candidates] == ["shy", "roman"]


def test_a_new_router_rekeys_every_adapter(registry: Registry, routing: Routing) -> None:
    old = routing.snapshot
    router = routing.load(fitted(seed=1))
    new = routing.snapshot
    assert new.router.digest == router.digest != old.router.digest
    assert names(routing) == set(ADAPTERS)
    fresh = Routing(registry, FINGERPRINT).snapshot
    assert bits(new, REVERSE) == bits(fresh, REVERSE) != bits(old, REVERSE)


def test_what_changes_while_a_router_loads_is_keyed_as_it_is_then(
    registry: Registry, routing: Routing, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = registry.set_router

    def meanwhile(files: dict[str, bytes]) -> str:
        registry.update("default", "polite", card=card("spell"))
        registry.unregister("default", "roman")
        registry.register("default", "new", adapter(9), card=card("double"))
        return store(files)

    monkeypatch.setattr(registry, "set_router", meanwhile)
    routing.load(fitted(seed=1))
    fresh = Routing(registry, FINGERPRINT)
    assert bits(routing.snapshot, REVERSE) == bits(fresh.snapshot, REVERSE)
    assert names(routing) == set(ADAPTERS) - {"roman"} | {"new"}


def test_a_router_that_cannot_be_used_leaves_the_one_in_use(
    registry: Registry, routing: Routing
) -> None:
    before, stored = routing.snapshot, registry.router()
    with pytest.raises(InvalidArgument):
        routing.load(fitted()[:-1])
    other = Routing(registry, "base-2")
    with pytest.raises(FailedPrecondition):
        other.load(fitted())
    assert other.snapshot is None
    assert routing.snapshot is before
    assert registry.router() == stored


def test_the_router_survives_a_restart_and_reaches_other_processes(tmp_path: Path) -> None:
    def opened() -> Registry:
        return Registry(tmp_path / "state", LIMITS, SHAPE, FINGERPRINT)

    with opened() as ours, opened() as theirs:
        routing, other = Routing(ours, FINGERPRINT), Routing(theirs, FINGERPRINT)
        ours.register("default", "reverse", adapter(1), card=card("reverse"))
        routing.load(fitted())
        assert other.snapshot is None
        theirs.refresh()
        wait_for(lambda: other.snapshot is not None)
        assert bits(other.snapshot, REVERSE) == bits(routing.snapshot, REVERSE)
        assert ours.router() == {ROUTER_FILE: fitted()}
    with opened() as again:
        assert best(Routing(again, FINGERPRINT), REVERSE) == "reverse"


def test_a_router_that_another_process_has_replaced_already_fails_no_registration(
    tmp_path: Path,
) -> None:
    with two(tmp_path) as (ours, theirs):
        routing, other = Routing(ours, FINGERPRINT), Routing(theirs, FINGERPRINT)
        for seed in (0, 1):
            routing.load(fitted(seed))
        theirs.register("default", "reverse", adapter(1), card=card("reverse"))
        wait_for(lambda: other.snapshot is not None)
        assert other.snapshot.router.digest == routing.snapshot.router.digest
        assert best(other, REVERSE) == "reverse"


def test_a_router_that_cannot_be_read_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with two(tmp_path) as (ours, theirs):
        routing, other = Routing(ours, FINGERPRINT), Routing(theirs, FINGERPRINT)
        read, reads = theirs.router, 0

        def broken() -> dict[str, bytes] | None:
            nonlocal reads
            reads += 1
            if reads == 1:
                raise OSError("input/output error")
            return read()

        monkeypatch.setattr(theirs, "router", broken)
        routing.load(fitted())
        theirs.refresh()
        wait_for(lambda: "input/output error" in caplog.text)
        assert other.snapshot is None
        routing.load(fitted(1))
        theirs.refresh()
        wait_for(lambda: other.snapshot is not None)


def test_a_router_that_the_store_does_not_give_now_is_taken_in_when_it_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Changed by another server, or there at the start: nobody tells of it a second time."""
    monkeypatch.setattr(routing_module, "AGAIN_SECONDS", 0.01)
    url = memory_url()
    with opened(url) as ours, opened(url) as theirs:
        other = Routing(theirs, "")
        ours.set_router({ROUTER_FILE: fitted()})
        read, refused = theirs.router, threading.Semaphore(0)

        def unavailable() -> dict[str, bytes] | None:
            refused.release()
            raise Unavailable("server.store: no answer")

        monkeypatch.setattr(theirs, "router", unavailable)
        theirs.poll()
        for _ in range(3):
            assert refused.acquire(timeout=20)
        assert caplog.text.count("is not there yet") == 1
        started = Routing(theirs, "")
        assert other.snapshot is started.snapshot is None
        monkeypatch.setattr(theirs, "router", read)
        wait_for(lambda: other.snapshot is not None and started.snapshot is not None)
        for routing in (other, started):
            routing.close()


def test_a_registration_does_not_wait_for_the_keys_of_another_process_s_router(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with two(tmp_path) as (ours, theirs):
        ours.register("default", "json", adapter(2), card=card("json"))
        theirs.refresh()
        routing, other = Routing(ours, FINGERPRINT), Routing(theirs, FINGERPRINT)
        routing.load(fitted())
        go_on, made = threading.Event(), routing_module.entries

        def entries(*args):
            assert go_on.wait(20)
            return made(*args)

        monkeypatch.setattr(routing_module, "entries", entries)
        theirs.register("default", "reverse", adapter(1), card=card("reverse"))
        assert other.snapshot is None
        go_on.set()
        wait_for(lambda: other.snapshot is not None)
        assert best(other, REVERSE) == "reverse"


def test_of_two_routers_of_other_processes_the_later_one_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is the one in use, and the keys of the other are ready only then."""
    with two(tmp_path) as (ours, theirs):
        ours.register("default", "reverse", adapter(1), card=card("reverse"))
        theirs.refresh()
        routing, other = Routing(ours, FINGERPRINT), Routing(theirs, FINGERPRINT)
        first = other.load(fitted())
        ours.refresh()
        wait_for(lambda: routing.snapshot is not None)
        begun, go_on, made = threading.Event(), threading.Event(), routing_module.entries

        def entries(router, *args):
            if router.digest != first.digest and threading.current_thread().name.startswith("rou"):
                begun.set()
                assert go_on.wait(20)
            return made(router, *args)

        monkeypatch.setattr(routing_module, "entries", entries)
        routing.load(fitted(1))
        theirs.refresh()
        assert begun.wait(20)
        routing.load(fitted())
        theirs.refresh()
        go_on.set()
        other._takers.shutdown(wait=True)
        assert other.snapshot.router.digest == first.digest


def test_an_adapter_of_another_base_is_no_candidate(tmp_path: Path) -> None:
    def opened(fingerprint: str) -> Registry:
        return Registry(tmp_path / "state", LIMITS, SHAPE, fingerprint)

    with opened(FINGERPRINT) as ours, opened("base-2") as theirs:
        routing = Routing(ours, FINGERPRINT)
        routing.load(fitted())
        foreign = replace(card("reverse"), base_fingerprint="base-2")
        theirs.register("default", "foreign", adapter(1), card=foreign)
        ours.refresh()
        assert names(routing) == set()
        assert names(Routing(ours, FINGERPRINT)) == set()


def test_decisions_agree_with_one_router_while_routers_and_adapters_change(
    registry: Registry, routing: Routing
) -> None:
    """Each decision is that of one router with its own keys, never of a mix."""
    allowed = {}
    for seed in (1, 0):
        routing.load(fitted(seed))
        routed = routing.route("default", REVERSE, ["reverse", "json"], 1)
        allowed[routed.router_digest] = routed
    stop, wrong, seen, failed = threading.Event(), [], set(), []

    def read() -> None:
        try:
            while not stop.is_set():
                routed = routing.route("default", REVERSE, ["reverse", "json"], 1)
                seen.add(routed.router_digest)
                if routed != allowed[routed.router_digest]:
                    wrong.append(routed)
        except Exception as e:
            failed.append(e)

    def register() -> None:
        for i in range(8):
            registry.register("default", f"extra{i}", adapter(60 + i), card=card("spell"))

    threads = [threading.Thread(target=f) for f in (read, read, register)]
    for thread in threads:
        thread.start()
    for seed in (1, 0, 1):
        routing.load(fitted(seed))
    threads[2].join()
    stop.set()
    for thread in threads[:2]:
        thread.join()
    assert failed == []
    assert wrong == []
    assert seen
    assert names(routing) == set(ADAPTERS) | {f"extra{i}" for i in range(8)}


def test_keys_that_wait_for_their_router_s_turn_take_a_byte_a_dimension(
    registry: Registry, routing: Routing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With thousands of adapters they would take hundreds of megabytes as floats."""
    store, held = registry.set_router, []

    def meanwhile(files: dict[str, bytes]) -> str:
        held.extend(row for _, row in routing._prepared.rows.values())
        return store(files)

    monkeypatch.setattr(registry, "set_router", meanwhile)
    routing.load(fitted(1))
    assert len(held) == len(ADAPTERS) + 1
    content = routing.snapshot.router.content
    for row in held:
        assert row.nbytes <= (1 + content.prototypes) * (content.dims + 4) + 1


def test_the_router_picks_shared_adapters_unless_the_tenant_took_their_name() -> None:
    """The tenant's own adapter of a name is the one that is meant, with prompts or without."""
    with Registry(None, LIMITS, SHAPE, FINGERPRINT) as registry:
        registry.register(SHARED_TENANT, "reverse", adapter(1), card=card("reverse"))
        registry.register("one", "uppercase", adapter(2), card=card("uppercase"))
        routing = Routing(registry, FINGERPRINT)
        routing.load(fitted())
        prompt = card("reverse").prompts[0]
        assert [routing.listed(t) for t in ("one", "two", SHARED_TENANT)] == [2, 1, 1]
        for tenant in ("one", "two"):
            assert routing.route(tenant, prompt, None, 1).choice.adapters == ("reverse",)
        registry.register("one", "reverse", adapter(3))
        picked = routing.route("one", prompt, None, 1).choice
        assert "reverse" not in picked.adapters
        assert "reverse" not in {c.adapter for c in picked.candidates}
        assert routing.listed("one") == 1
        assert routing.route("two", prompt, None, 1).choice.adapters == ("reverse",)
