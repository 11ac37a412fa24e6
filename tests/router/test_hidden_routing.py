"""Routing with a router on hidden states: the base answers when it can, and nobody waits for it
where he must not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mora_serve.adapters.card import RoutingCard
from mora_serve.adapters.record import Change
from mora_serve.adapters.registry import Registry
from mora_serve.config import Config
from mora_serve.errors import FailedPrecondition, Internal, Unavailable
from mora_serve.router.features import PooledHidden
from mora_serve.router.routing import ROUTER_FILE, Routing
from mora_serve.router.selection import AutoRoute, Selector, TaskHint
from mora_serve.router.states import State
from tests.adapters.make import LIMITS, SHAPE, adapter
from tests.router.conftest import ADAPTERS
from tests.router.make import FINGERPRINT, HIDDEN, Base, card, fitted, pooled, prompts, tiny
from tests.router.test_routing import REVERSE, best, names, wait_for
from tests.router.test_routing import bits as bits_of

SPELL = "spell 'kavo' letter by letter"
NEW = ("default", "speller")


@pytest.fixture
def base() -> Base:
    return Base()


@pytest.fixture
def routing(registry: Registry, base: Base) -> Iterator[Routing]:
    routing = Routing(registry, FINGERPRINT, base)
    routing.load(fitted(hidden=HIDDEN))
    yield routing
    base.release()
    routing.close()


def keyed(routing: Routing, key: tuple[str, str]) -> None:
    """Wait as a registration does."""
    while (done := routing.expected(key)) is not None:
        done.result(20)


def bits(routing: Routing) -> dict[str, bytes]:
    return bits_of(routing.snapshot, REVERSE, pooled([REVERSE])[0])


def test_prompts_reach_their_adapters(routing: Routing) -> None:
    asked = [(name, text) for name in ADAPTERS for text in prompts(name, 21, 10)]
    right = [routing.route("default", text, None, 1).choice.adapters == (n,) for n, text in asked]
    assert sum(right) >= 0.95 * len(right)


def test_the_state_that_was_asked_for_is_used(routing: Routing, base: Base) -> None:
    asked = routing.ask(REVERSE)
    assert asked is not None
    state = State(asked.text, asked.hidden, asked.states.result()[0])
    base.asked.clear()
    routed = routing.route("default", REVERSE, None, 2, state)
    assert not base.asked
    assert routed == routing.route("default", REVERSE, None, 2)
    assert base.asked == [((REVERSE,), False)]


def test_the_base_is_told_whose_prompt_it_is_asked_about(
    registry: Registry, routing: Routing, base: Base
) -> None:
    """Asked before or while routing, by a hint or without; keys are nobody's, in the background."""
    for name in ("json", "reverse"):
        registry.update("default", name, tasks=["both"])
        registry.register("other", name, adapter(7), card=replace(card(name), tasks=("both",)))
    selector, hint = Selector(registry, routing, Config()), TaskHint(("both",))
    keyed(routing, ("other", "reverse"))
    assert set(base.tenants) == {""}
    for selection in (AutoRoute(), hint):
        for tenant in ("default", "other"):
            for ask in (selector.ask, selector.decide):
                base.tenants.clear()
                ask(tenant, selection, REVERSE)
                assert base.tenants == [tenant]


def test_a_state_of_another_text_or_for_another_router_is_not(routing: Routing, base: Base) -> None:
    right = routing.route("default", REVERSE, None, 2)
    wrong = pooled(["as a json object"])[0]
    for state in (State("x", HIDDEN, wrong), State(REVERSE, replace(HIDDEN, depth=2), wrong)):
        assert routing.route("default", REVERSE, None, 2, state) == right


def test_a_router_on_n_grams_never_asks_the_base(registry: Registry, base: Base) -> None:
    routing = Routing(registry, FINGERPRINT, base)
    assert routing.ask(REVERSE) is None
    routing.load(fitted())
    registry.register(*NEW, adapter(9), card=card("spell"))
    assert routing.ask(SPELL) is None
    assert routing.expected(NEW) is None
    assert best(routing, SPELL) == "speller"
    assert not base.asked


def test_a_registration_does_not_wait_for_the_base_and_its_key_follows(
    registry: Registry, routing: Routing, base: Base
) -> None:
    before = bits(routing)
    base.held = True
    registry.register(*NEW, adapter(9), card=card("spell"))
    assert routing.expected(NEW) is not None
    assert bits(routing) == before
    base.release()
    keyed(routing, NEW)
    assert best(routing, SPELL) == "speller"
    after = bits(routing)
    assert {n: b for n, b in after.items() if n != "speller"} == before
    assert base.asked[-2][1]  # keys are background work


def test_many_registrations_share_what_is_asked_of_the_base(
    registry: Registry, routing: Routing, base: Base
) -> None:
    base.held = True
    base.asked.clear()
    for i in range(40):
        registry.register("default", f"a{i}", adapter(60 + i), card=card("spell", seed=i, count=4))
    base.release()
    for i in range(40):
        keyed(routing, ("default", f"a{i}"))
    assert len(base.asked) <= 3
    assert {f"a{i}" for i in range(40)} <= set(bits(routing))


def test_an_adapter_keeps_its_key_until_the_new_one_is_there(
    registry: Registry, routing: Routing, base: Base
) -> None:
    base.held = True
    registry.update("default", "polite", card=card("spell"))
    assert "polite" in bits(routing)
    old = bits(routing)
    base.release()
    keyed(routing, ("default", "polite"))
    assert bits(routing)["polite"] != old["polite"]
    assert best(routing, SPELL) == "polite"


def test_an_adapter_removed_meanwhile_gets_no_key(
    registry: Registry, routing: Routing, base: Base
) -> None:
    base.held = True
    registry.register(*NEW, adapter(9), card=card("spell"))
    done = routing.expected(NEW)
    registry.unregister(*NEW)
    assert done is not None
    assert done.result(20) is None
    assert routing.expected(NEW) is None
    registry.register("default", "other", adapter(10), card=card("double"))
    base.release()
    keyed(routing, ("default", "other"))
    assert set(bits(routing)) == {*ADAPTERS, "other"}


def test_of_two_cards_the_later_one_counts(
    registry: Registry, routing: Routing, base: Base
) -> None:
    base.held = True
    registry.register(*NEW, adapter(9), card=card("double"))
    registry.update(*NEW, card=card("spell"))
    base.release()
    keyed(routing, NEW)
    assert bits(routing) == bits(Routing(registry, FINGERPRINT, base))


def test_a_change_made_known_after_a_new_router_has_seen_it_leaves_nobody_waiting(
    registry: Registry, routing: Routing, base: Base
) -> None:
    base.held = True
    record, _ = registry.register(*NEW, adapter(9), card=card("spell"))
    first = routing.expected(NEW)
    routing._changed(Change(registry.revision, None, record))
    assert first is not None
    first.result(20)
    base.release()
    keyed(routing, NEW)
    assert best(routing, SPELL) == "speller"


def test_a_card_without_anything_to_go_by_takes_the_key_away(
    registry: Registry, routing: Routing
) -> None:
    registry.update("default", "polite", card=RoutingCard())
    keyed(routing, ("default", "polite"))
    assert "polite" not in bits(routing)
    registry.update("default", "polite", card=RoutingCard("spell it letter by letter"))
    keyed(routing, ("default", "polite"))
    assert "polite" not in names(routing)
    assert "polite" in bits_of(routing.snapshot, SPELL, pooled([SPELL])[0], ["polite"])


def test_the_old_router_decides_until_all_keys_of_the_new_one_are_there(
    registry: Registry, routing: Routing, base: Base
) -> None:
    old = routing.snapshot
    base.held = True
    asked = len(base.asked)
    loading = threading.Thread(target=routing.load, args=(fitted(1, HIDDEN),))
    loading.start()
    wait_for(lambda: len(base.asked) > asked)
    assert routing.snapshot is old
    base.release()
    loading.join(20)
    assert not loading.is_alive()
    assert routing.snapshot.router.digest != old.router.digest
    assert set(bits(routing)) == set(ADAPTERS)
    assert bits(routing) == bits(Routing(registry, FINGERPRINT, base))


def test_what_changes_while_a_router_loads_is_keyed_as_it_is_then(
    registry: Registry, routing: Routing, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = registry.set_router

    def meanwhile(files: dict[str, bytes]) -> str:
        registry.update("default", "polite", card=card("spell"))
        registry.unregister("default", "roman")
        registry.register("default", "new", adapter(9), card=card("double"))
        return store(files)

    monkeypatch.setattr(registry, "set_router", meanwhile)
    routing.load(fitted(1, HIDDEN))
    assert bits(routing) == bits(Routing(registry, FINGERPRINT, base))
    assert set(bits(routing)) == set(ADAPTERS) - {"roman"} | {"new"}


def load_while(routing: Routing, base: Base, change: Callable[[], object]) -> int:
    """Load a router, ``change`` something while its keys are made; how often the base was asked."""
    base.held, asked = True, len(base.asked)
    loading = threading.Thread(target=routing.load, args=(fitted(1, HIDDEN),))
    loading.start()
    wait_for(lambda: len(base.asked) > asked)
    change()
    base.release()
    loading.join(20)
    assert not loading.is_alive()
    return len(base.asked) - asked


def test_a_pin_while_a_router_loads_costs_no_key(
    registry: Registry, routing: Routing, base: Base
) -> None:
    assert load_while(routing, base, lambda: registry.pin("default", "reverse", True)) == 1
    assert set(bits(routing)) == set(ADAPTERS)


def test_records_read_anew_from_another_process_cost_no_keys(tmp_path: Path, base: Base) -> None:
    """As they are once the other process has compacted the log."""

    def opened(every: int) -> Registry:
        return Registry(tmp_path / "state", LIMITS, SHAPE, FINGERPRINT, snapshot_every=every)

    with opened(1) as ours, opened(256) as theirs:
        for i, name in enumerate(ADAPTERS):
            ours.register("default", name, adapter(i), card=card(name))
        theirs.refresh()
        other = Routing(theirs, FINGERPRINT, base)
        before = theirs.get("default", "json")
        assert load_while(other, base, lambda: ours.pin("default", "reverse", True)) == 1
        assert theirs.get("default", "json") is not before
        assert set(bits(other)) == set(ADAPTERS)
        other.close()


def test_what_changes_while_a_router_s_keys_are_made_has_one_when_it_takes_over(
    registry: Registry, routing: Routing, base: Base
) -> None:
    at_once: list[tuple[bool, bool]] = []

    def note(change: Change) -> None:
        if change.router is not None:
            index = routing.snapshot.index
            at_once.append((NEW in index, ("default", "polite") in index))

    def change() -> None:
        registry.register(*NEW, adapter(9), card=card("spell"))
        registry.update("default", "polite", card=card("double"))

    registry.subscribe(note)
    load_while(routing, base, change)
    assert at_once == [(True, True)]
    assert bits(routing) == bits(Routing(registry, FINGERPRINT, base))


def test_a_router_in_use_has_loaded_whatever_becomes_of_keys_that_follow(
    registry: Registry, routing: Routing, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card that changes at the last moment, a registration right after."""
    store = registry.set_router

    def meanwhile(files: dict[str, bytes]) -> str:
        base.error = Internal("router: no state")
        registry.update("default", "polite", card=card("spell"))
        digest = store(files)
        registry.register(*NEW, adapter(9), card=card("spell"))
        return digest

    monkeypatch.setattr(registry, "set_router", meanwhile)
    router = routing.load(fitted(1, HIDDEN))
    assert routing.snapshot.router.digest == router.digest
    base.error = None
    for key in (NEW, ("default", "polite")):
        wait_for(lambda key=key: routing.expected(key) is None)
    assert bits(routing) == bits(Routing(registry, FINGERPRINT, base))


def test_loading_a_router_waits_for_no_key_of_a_later_registration(
    registry: Registry, routing: Routing, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = registry.set_router

    def meanwhile(files: dict[str, bytes]) -> str:
        digest = store(files)
        base.held = True
        registry.register(*NEW, adapter(9), card=card("spell"))
        return digest

    monkeypatch.setattr(registry, "set_router", meanwhile)
    loading = threading.Thread(target=routing.load, args=(fitted(1, HIDDEN),), daemon=True)
    loading.start()
    loading.join(20)
    assert not loading.is_alive()
    assert routing.expected(NEW) is not None


def test_a_base_that_fails_leaves_the_router_in_use(routing: Routing, base: Base) -> None:
    before = routing.snapshot
    base.error = Internal("router: no state")
    with pytest.raises(Internal):
        routing.load(fitted(1, HIDDEN))
    with pytest.raises(Internal):
        routing.route("default", REVERSE, None, 1)
    base.error = None
    assert routing.snapshot is before
    assert best(routing, REVERSE) == "reverse"


def test_whoever_waits_for_a_key_learns_that_the_base_failed_and_others_follow(
    registry: Registry, routing: Routing, base: Base
) -> None:
    base.held, base.error = True, Unavailable("the server is shutting down")
    registry.register(*NEW, adapter(9), card=card("spell"))
    done = routing.expected(NEW)
    base.release()
    assert done is not None
    with pytest.raises(Unavailable):
        done.result(20)
    base.error = None
    registry.register("default", "late", adapter(10), card=card("double"))
    keyed(routing, ("default", "late"))
    assert set(bits(routing)) == {*ADAPTERS, "late"}
    keyed(routing, NEW)  # asked for again, it is tried again
    assert best(routing, SPELL) == "speller"


def test_a_failure_that_came_first_is_told_too(
    registry: Registry, routing: Routing, base: Base
) -> None:
    base.error = Unavailable("the server is shutting down")
    registry.register(*NEW, adapter(9), card=card("spell"))
    wait_for(lambda: not routing._working)
    with pytest.raises(Unavailable):
        keyed(routing, NEW)
    registry.unregister(*NEW)
    assert routing.expected(NEW) is None


def test_nobody_waits_for_a_key_once_it_is_closed(
    registry: Registry, routing: Routing, base: Base
) -> None:
    base.held = True
    registry.register(*NEW, adapter(9), card=card("spell"))
    done = routing.expected(NEW)
    routing.close()
    assert done is not None
    with pytest.raises(Unavailable):
        done.result(20)
    registry.register("default", "late", adapter(10), card=card("spell"))
    assert routing.expected(("default", "late")) is None


def test_it_survives_a_restart_and_reaches_other_processes_at_the_base_s_pace(
    tmp_path: Path, base: Base
) -> None:
    def opened() -> Registry:
        return Registry(tmp_path / "state", LIMITS, SHAPE, FINGERPRINT)

    with opened() as ours, opened() as theirs:
        routing = Routing(ours, FINGERPRINT, Base())
        other = Routing(theirs, FINGERPRINT, base)
        ours.register("default", "reverse", adapter(1), card=card("reverse"))
        routing.load(fitted())
        theirs.refresh()
        wait_for(lambda: other.snapshot is not None)
        before = other.snapshot
        routing.load(fitted(hidden=HIDDEN))
        base.held = True
        theirs.refresh()
        assert other.snapshot is before is not None
        base.release()
        wait_for(lambda: other.hidden == HIDDEN)
        assert bits(other) == bits(routing)
    with opened() as again:
        restarted = Routing(again, FINGERPRINT, base)
        assert best(restarted, REVERSE) == "reverse"


def test_the_router_in_use_is_loaded_again_without_new_keys(
    registry: Registry, routing: Routing, base: Base
) -> None:
    """As one that is configured is at each start."""
    restarted = Routing(registry, FINGERPRINT, base)
    before, asked = restarted.snapshot, len(base.asked)
    router = restarted.load(fitted(hidden=HIDDEN))
    assert restarted.snapshot is before
    assert before.router is router
    assert len(base.asked) == asked


def test_the_router_in_use_replaces_a_stored_one_that_is_not(
    registry: Registry, routing: Routing, base: Base
) -> None:
    before, asked = routing.snapshot, len(base.asked)
    base.held = True
    registry.set_router({ROUTER_FILE: fitted(1, HIDDEN)})
    wait_for(lambda: len(base.asked) > asked)
    routing.load(fitted(hidden=HIDDEN))
    base.release()
    routing._takers.shutdown(wait=True)
    assert registry.router() == {ROUTER_FILE: fitted(hidden=HIDDEN)}
    assert routing.snapshot is before


def test_the_router_in_use_loaded_again_makes_the_keys_that_failed(
    registry: Registry, routing: Routing, base: Base
) -> None:
    base.error = Internal("router: no state")
    registry.register(*NEW, adapter(9), card=card("spell"))
    wait_for(lambda: not routing._working)
    base.error = None
    routing.load(fitted(hidden=HIDDEN))
    assert best(routing, SPELL) == "speller"


def test_a_stored_router_whose_keys_failed_is_in_use_once_it_is_loaded_again(
    tmp_path: Path, base: Base
) -> None:
    def opened() -> Registry:
        return Registry(tmp_path / "state", LIMITS, SHAPE, FINGERPRINT)

    with opened() as ours, opened() as theirs:
        routing = Routing(ours, FINGERPRINT, Base())
        other = Routing(theirs, FINGERPRINT, base)
        ours.register("default", "reverse", adapter(1), card=card("reverse"))
        routing.load(fitted(hidden=HIDDEN))
        base.error = Internal("router: no state")
        theirs.refresh()
        wait_for(lambda: base.asked)
        assert other.snapshot is None
        base.error = None
        other.load(fitted(hidden=HIDDEN))
        assert best(other, REVERSE) == "reverse"
        assert bits(other) == bits(routing)


def test_of_two_routers_of_other_processes_the_later_one_is_used(
    tmp_path: Path, base: Base
) -> None:
    def opened() -> Registry:
        return Registry(tmp_path / "state", LIMITS, SHAPE, FINGERPRINT)

    with opened() as ours, opened() as theirs:
        routing = Routing(ours, FINGERPRINT, Base())
        other = Routing(theirs, FINGERPRINT, base)
        ours.register("default", "reverse", adapter(1), card=card("reverse"))
        base.held = True
        routing.load(fitted(hidden=HIDDEN))
        theirs.refresh()
        wait_for(lambda: base.asked)
        routing.load(fitted())
        theirs.refresh()
        digest = routing.snapshot.router.digest
        wait_for(lambda: other.snapshot is not None)
        assert other.snapshot.router.digest == digest
        base.release()
        other._takers.shutdown(wait=True)
        assert other.snapshot.router.digest == digest


def test_a_router_that_the_base_does_not_fit_is_refused(routing: Routing) -> None:
    before = routing.snapshot
    other = tiny(hidden=PooledHidden(1, 6)).to_bytes()
    with pytest.raises(FailedPrecondition) as e:
        routing.load(other)
    assert e.value.field == "router.features"
    assert routing.snapshot is before


def test_without_a_base_it_is_refused_and_a_stored_one_is_left_alone(
    registry: Registry, routing: Routing
) -> None:
    alone = Routing(registry, FINGERPRINT)
    assert alone.snapshot is None
    with pytest.raises(FailedPrecondition, match="n-grams"):
        alone.load(fitted(hidden=HIDDEN))
    assert routing.snapshot is not None


def test_a_registration_does_not_wait_for_the_keys_of_another_process_s_router(
    tmp_path: Path, base: Base
) -> None:
    """The router in use gives the adapter its key, and the new one gives it one of its own."""

    def opened() -> Registry:
        return Registry(tmp_path / "state", LIMITS, SHAPE, FINGERPRINT)

    with opened() as ours, opened() as theirs:
        routing = Routing(ours, FINGERPRINT, Base())
        routing.load(fitted(hidden=HIDDEN))
        ours.register("default", "reverse", adapter(1), card=card("reverse"))
        theirs.refresh()
        other = Routing(theirs, FINGERPRINT, base)
        base.held = True
        routing.load(fitted(1, HIDDEN))
        asked = len(base.asked)
        theirs.refresh()
        wait_for(lambda: len(base.asked) > asked)
        first, base._waiting = base._waiting, []  # what the new router asks stays unanswered
        base.held = False
        theirs.register(*NEW, adapter(9), card=card("spell"))
        keyed(other, NEW)
        assert other.snapshot.router.digest != routing.snapshot.router.digest
        assert best(other, SPELL) == "speller"
        base._waiting = first
        base.release()
        wait_for(lambda: other.snapshot.router.digest == routing.snapshot.router.digest)
        keyed(other, NEW)
        ours.refresh()
        keyed(routing, NEW)
        assert bits(other) == bits(routing)
        other.close()
