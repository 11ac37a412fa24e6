"""What a caller asks for becomes the mixture that runs, or an error that names the field."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mora_serve.adapters.card import RoutingCard
from mora_serve.adapters.registry import Registry
from mora_serve.config import AdaptersConfig, Config, RouterConfig
from mora_serve.core import AdapterWeight, Candidate, Mixture, Source
from mora_serve.errors import FailedPrecondition, InvalidArgument, MoraError, NotFound
from mora_serve.router.decide import Choice
from mora_serve.router.routing import Routed, Routing
from mora_serve.router.selection import AutoRoute, BaseOnly, Selector, TaskHint
from tests.adapters.make import LIMITS, SHAPE, adapter
from tests.router.conftest import ADAPTERS
from tests.router.make import FINGERPRINT, card, fitted, prompts

REVERSE = "reverse 'kavoja'"
NEWS = "Parliament confirmed the budget on Tuesday."


@pytest.fixture
def selector(registry: Registry, routing: Routing) -> Selector:
    return Selector(registry, routing, Config())


def digest(registry: Registry, name: str, tenant: str = "default") -> str:
    return registry.get(tenant, name).digest


def mixture(*adapters: tuple[str, float]) -> Mixture:
    return Mixture(tuple(AdapterWeight(name, weight) for name, weight in adapters))


def refused(selector: Selector, selection, kind: type[MoraError], field: str) -> str:
    with pytest.raises(kind) as e:
        selector.decide("default", selection, REVERSE)
    assert type(e.value) is kind
    assert e.value.field == field
    assert e.value.message.startswith(f"{field}: ")
    return e.value.message


def test_an_explicit_mixture_keeps_its_weights_and_gets_digests(
    selector: Selector, registry: Registry
) -> None:
    decision = selector.decide("default", mixture(("json", 0.5), ("reverse", -1e30)), REVERSE)
    assert decision.source is Source.EXPLICIT
    assert decision.mixture.adapters == (
        AdapterWeight("json", 0.5, digest(registry, "json")),
        AdapterWeight("reverse", -1e30, digest(registry, "reverse")),
    )
    assert (decision.candidates, decision.router_digest) == ((), "")
    assert decision.mixture.key()


def test_a_decision_sent_back_is_the_same_mixture(selector: Selector) -> None:
    routed = selector.decide("default", AutoRoute(), REVERSE)
    again = selector.decide("default", routed.mixture, NEWS)
    assert again.mixture == routed.mixture


def test_the_base_is_asked_for_or_an_empty_mixture(selector: Selector) -> None:
    for selection in (BaseOnly(), Mixture()):
        decision = selector.decide("default", selection, REVERSE)
        assert (decision.mixture, decision.source) == (Mixture(), Source.BASE)


def test_an_unknown_adapter_is_not_found_with_the_nearest_of_the_tenant(
    selector: Selector,
) -> None:
    message = refused(
        selector, mixture(("json", 1), ("revers", 1)), NotFound, "mixture.adapters[1].adapter"
    )
    assert "reverse" in message
    message = refused(selector, mixture(("theirs", 1)), NotFound, "mixture.adapters[0].adapter")
    assert "did you mean" not in message


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, 1e39])
def test_a_weight_that_is_not_finite_is_refused(selector: Selector, weight: float) -> None:
    refused(selector, mixture(("json", weight)), InvalidArgument, "mixture.adapters[0].weight")


def test_an_adapter_named_twice_is_refused(selector: Selector) -> None:
    twice = mixture(("json", 1), ("json", 2))
    refused(selector, twice, InvalidArgument, "mixture.adapters[1].adapter")


def test_too_many_adapters_are_refused(selector: Selector) -> None:
    refused(selector, mixture(*((n, 1) for n in ADAPTERS)), InvalidArgument, "mixture.adapters")
    refused(selector, TaskHint(ADAPTERS), InvalidArgument, "task.tasks")
    refused(selector, AutoRoute(max_adapters=5), InvalidArgument, "auto.max_adapters")
    refused(selector, AutoRoute(max_adapters=-1), InvalidArgument, "auto.max_adapters")


def test_a_digest_has_to_be_the_present_version(selector: Selector, registry: Registry) -> None:
    old = digest(registry, "json")
    given = Mixture((AdapterWeight("json", 1.0, old),))
    assert selector.decide("default", given, "").mixture == given
    registry.register("default", "json", adapter(70), replace=True)
    message = refused(selector, given, NotFound, "mixture.adapters[0].digest")
    assert digest(registry, "json") in message


def test_each_task_runs_one_adapter_and_several_compose(
    selector: Selector, registry: Registry
) -> None:
    decision = selector.decide("default", TaskHint(("json", "reverse", "json")), NEWS)
    assert decision.source is Source.TASK
    assert decision.mixture.adapters == (
        AdapterWeight("json", 1.0, digest(registry, "json")),
        AdapterWeight("reverse", 1.0, digest(registry, "reverse")),
    )
    assert (decision.candidates, decision.router_digest) == ((), "")


def test_the_router_ranks_the_adapters_of_a_task(
    selector: Selector, registry: Registry, routing: Routing
) -> None:
    for seed, (name, task) in enumerate((("a-speller", "spell"), ("z-speller", "spell"))):
        spelling = card(task, seed=seed, count=4)
        registry.register("default", name, adapter(80 + seed), card=spelling)
    asked = {}
    for name in ("a-speller", "z-speller"):
        text = registry.get("default", name).card.prompts[0]
        decision = selector.decide("default", TaskHint(("spell",)), text)
        asked[name] = decision.mixture.adapters[0].adapter
        assert {c.adapter for c in decision.candidates} == {"a-speller", "z-speller"}
        assert decision.router_digest == routing.snapshot.router.digest
        assert decision.source is Source.TASK
    assert asked == {"a-speller": "a-speller", "z-speller": "z-speller"}


def test_a_task_never_abstains(selector: Selector, registry: Registry) -> None:
    both = replace(card("roman"), tasks=("json",))
    registry.register("default", "second", adapter(80), card=both)
    decision = selector.decide("default", TaskHint(("json",)), NEWS)
    assert len(decision.mixture.adapters) == 1


def test_one_adapter_for_two_tasks_runs_once(selector: Selector, registry: Registry) -> None:
    registry.update("default", "json", tasks=["one", "two"])
    decision = selector.decide("default", TaskHint(("one", "two")), REVERSE)
    assert [a.adapter for a in decision.mixture.adapters] == ["json"]


def test_without_a_router_the_first_adapter_of_a_task_runs(registry: Registry) -> None:
    registry.register("default", "a", adapter(80), card=card("reverse"))
    selector = Selector(registry, Routing(registry, FINGERPRINT), Config())
    decision = selector.decide("default", TaskHint(("reverse",)), REVERSE)
    assert [a.adapter for a in decision.mixture.adapters] == ["a"]


def test_a_task_reaches_an_adapter_without_prompts(selector: Selector, registry: Registry) -> None:
    registry.register("default", "mute", adapter(80), card=RoutingCard(tasks=("hum",)))
    decision = selector.decide("default", TaskHint(("hum",)), REVERSE)
    assert [a.adapter for a in decision.mixture.adapters] == ["mute"]


def test_an_unknown_task_is_not_found_with_the_nearest_task(selector: Selector) -> None:
    message = refused(selector, TaskHint(("json", "revers")), NotFound, "task.tasks[1]")
    assert "reverse" in message
    refused(selector, TaskHint(()), InvalidArgument, "task.tasks")


def test_an_unknown_task_may_fall_back_to_the_router(selector: Selector) -> None:
    decision = selector.decide("default", TaskHint(("unheard-of",), True), REVERSE)
    assert decision.source is Source.ROUTER
    assert decision.mixture.adapters[0].adapter == "reverse"


def test_the_router_picks_at_weight_one_with_digests(
    selector: Selector, registry: Registry, routing: Routing
) -> None:
    decision = selector.decide("default", AutoRoute(), REVERSE)
    assert decision.source is Source.ROUTER
    assert decision.mixture.adapters == (
        AdapterWeight("reverse", 1.0, digest(registry, "reverse")),
    )
    assert decision.candidates[0].adapter == "reverse"
    assert decision.candidates[0].probability > 0.5
    assert decision.router_digest == routing.snapshot.router.digest


def test_a_prompt_of_no_adapter_gets_the_base(selector: Selector, routing: Routing) -> None:
    decision = selector.decide("default", AutoRoute(), NEWS)
    assert (decision.mixture, decision.source) == (Mixture(), Source.ABSTAINED)
    assert decision.router_digest == routing.snapshot.router.digest
    assert decision.candidates


@pytest.mark.parametrize("text", ["", "?!"])
def test_a_text_without_a_word_gets_the_base(selector: Selector, text: str) -> None:
    assert selector.decide("default", AutoRoute(), text).source is Source.ABSTAINED


def test_without_a_router_the_base_answers(registry: Registry) -> None:
    selector = Selector(registry, Routing(registry, FINGERPRINT), Config())
    decision = selector.decide("default", AutoRoute(), REVERSE)
    assert (decision.mixture, decision.source) == (Mixture(), Source.ABSTAINED)
    assert (decision.candidates, decision.router_digest) == ((), "")


def test_a_text_of_its_own_is_routed_instead(selector: Selector) -> None:
    text = prompts("roman", 5, 1)[0]
    decision = selector.decide("default", AutoRoute(text=text), REVERSE)
    assert [a.adapter for a in decision.mixture.adapters] == ["roman"]


def test_only_candidates_that_are_named_are_considered(
    selector: Selector, registry: Registry
) -> None:
    decision = selector.decide("default", AutoRoute(candidates=("json", "roman")), REVERSE)
    assert {c.adapter for c in decision.candidates} == {"json", "roman"}
    assert {a.adapter for a in decision.mixture.adapters} <= {"json", "roman"}
    message = refused(
        selector, AutoRoute(candidates=("json", "roma")), NotFound, "auto.candidates[1]"
    )
    assert "roman" in message
    refused(selector, AutoRoute(candidates=("theirs",)), NotFound, "auto.candidates[0]")


def picking(registry: Registry, picked: tuple[str, ...]) -> Callable[..., Routed]:
    """Routing that picks these; ``uppercase`` is removed while it does."""

    def route(*_: object) -> Routed:
        if "uppercase" in picked:
            registry.unregister("default", "uppercase")
        return Routed(Choice(picked, tuple(Candidate(name, 0.9, 0.9) for name in picked)), "router")

    return route


@pytest.mark.parametrize("bad", ["theirs", "uppercase"])
@pytest.mark.parametrize(
    "selection",
    [AutoRoute(), AutoRoute(candidates=("reverse",)), TaskHint(("both",)), TaskHint(("x",), True)],
    ids=["auto", "candidates", "task", "fallback"],
)
def test_what_the_router_picked_is_used_only_if_the_tenant_may(
    registry: Registry, routing: Routing, monkeypatch: pytest.MonkeyPatch, selection, bad: str
) -> None:
    """ecosystem.md's precedent "After routing, check that the tenant may use what the router
    picked": an index that is wrong or behind gives away neither an adapter nor its name.
    """
    for name in ("json", "reverse"):
        registry.update("default", name, tasks=["both"])
    monkeypatch.setattr(routing, "route", picking(registry, (bad, "reverse")))
    decision = Selector(registry, routing, Config()).decide("default", selection, REVERSE)
    assert decision.router_digest == "router"  # it was asked
    assert [a.adapter for a in decision.mixture.adapters] == ["reverse"]
    assert [c.adapter for c in decision.candidates] == ["reverse"]


@pytest.mark.parametrize("bad", ["theirs", "uppercase"])
def test_where_the_router_picked_nothing_that_the_tenant_may_use_the_base_answers(
    registry: Registry, routing: Routing, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    monkeypatch.setattr(routing, "route", picking(registry, (bad,)))
    decision = Selector(registry, routing, Config()).decide("default", AutoRoute(), REVERSE)
    assert (decision.mixture, decision.source) == (Mixture(), Source.ABSTAINED)
    assert decision.candidates == ()


def test_a_prompt_that_asks_for_two_gets_two_of_different_groups(registry: Registry) -> None:
    routing = Routing(registry, FINGERPRINT)
    routing.load(fitted())
    text = "'77' in roman digits as json"
    for most, count in ((1, 1), (2, 2)):
        config = Config(router=RouterConfig(max_adapters=most))
        decision = Selector(registry, routing, config).decide("default", AutoRoute(), text)
        assert len(decision.mixture.adapters) == count
    assert {a.adapter for a in decision.mixture.adapters} == {"roman", "json"}


def test_the_router_mixes_no_more_than_a_mixture_may_have(
    registry: Registry, routing: Routing
) -> None:
    config = Config(adapters=AdaptersConfig(max_mixture=1), router=RouterConfig(max_adapters=3))
    text = "'77' in roman digits as json"
    decision = Selector(registry, routing, config).decide("default", AutoRoute(), text)
    assert len(decision.mixture.adapters) == 1


def test_an_adapter_of_another_base_is_a_failed_precondition(tmp_path) -> None:
    foreign = replace(card("reverse"), base_fingerprint="base-2")
    with Registry(tmp_path / "state", LIMITS, SHAPE, "base-2") as theirs:
        theirs.register("default", "foreign", adapter(1), card=foreign)
    with Registry(tmp_path / "state", LIMITS, SHAPE, FINGERPRINT) as ours:
        selector = Selector(ours, Routing(ours, FINGERPRINT), Config())
        for selection, field in (
            (mixture(("foreign", 1)), "mixture.adapters[0].adapter"),
            (AutoRoute(candidates=("foreign",)), "auto.candidates[0]"),
        ):
            refused(selector, selection, FailedPrecondition, field)
        refused(selector, TaskHint(("reverse",)), NotFound, "task.tasks[0]")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    tenant=st.sampled_from(["default", "other", "nobody"]),
    text=st.sampled_from([REVERSE, NEWS, "", *(prompts(n, 9, 1)[0] for n in ADAPTERS)]),
    names=st.lists(st.sampled_from([*ADAPTERS, "theirs", "x"]), max_size=3).map(tuple),
    most=st.integers(-1, 6),
    fallback=st.booleans(),
)
def test_whatever_is_asked_no_other_tenant_shows_and_the_answer_is_the_same_again(
    selector: Selector, registry: Registry, tenant, text, names, most, fallback
) -> None:
    own = {r.name: r.digest for r in registry.list(tenant)}
    for selection in (
        AutoRoute("", names, most),
        TaskHint(names, fallback),
        mixture(*((n, 1.0) for n in names)),
    ):
        try:
            decision = selector.decide(tenant, selection, text)
        except MoraError as e:
            message = e.message
        else:
            message = ""
        hidden = {"theirs", *ADAPTERS} - set(own) - set(names)
        assert not any(n in message for n in hidden)
        if message:
            continue
        assert all(own[a.adapter] == a.digest for a in decision.mixture.adapters)
        assert {c.adapter for c in decision.candidates} <= set(own)
        assert selector.decide(tenant, selection, text) == decision
