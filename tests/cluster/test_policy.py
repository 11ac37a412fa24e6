"""Routing to replicas: residency first, load where it matters, chance where nothing is known."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.cluster.policy import ROUTINGS, SLACK, Fleet, Routing, choose
from mora_serve.config import DEFAULT_SPILL

ADAPTERS = st.sampled_from("abcdef")
REPORTS = st.lists(st.tuples(st.sets(ADAPTERS), st.integers(0, 50)), min_size=1, max_size=6)


def fleet_of(reports: list[tuple[set[str], int]]) -> Fleet[int]:
    fleet: Fleet[int] = Fleet()
    for key, (resident, load) in enumerate(reports):
        fleet.report(key, resident, load)
    return fleet


@given(REPORTS, st.lists(ADAPTERS, max_size=3), st.sampled_from(ROUTINGS), st.integers())
def test_a_choice_is_a_replica_and_the_same_for_the_same_seed(
    reports: list[tuple[set[str], int]], adapters: list[str], routing: Routing, seed: int
) -> None:
    fleet = fleet_of(reports)
    chosen = choose(fleet, adapters, Random(seed), routing)
    assert chosen in fleet
    assert chosen == choose(fleet, adapters, Random(seed), routing)


@given(REPORTS, st.lists(ADAPTERS, min_size=1, max_size=3), st.integers())
def test_affinity_leaves_the_best_holders_only_for_a_less_loaded_replica(
    reports: list[tuple[set[str], int]], adapters: list[str], seed: int
) -> None:
    fleet = fleet_of(reports)
    chosen = choose(fleet, adapters, Random(seed))
    held = [len(resident & set(adapters)) for resident, _ in reports]
    if held[chosen] == max(held):
        return
    best = [load for h, (_, load) in zip(held, reports, strict=True) if h == max(held)]
    assert fleet.load(chosen) < max(best)
    assert max(best) > DEFAULT_SPILL * fleet.mean_load + SLACK


@given(st.lists(st.integers(0, 50), min_size=2, max_size=6), st.integers())
def test_the_most_loaded_replica_is_never_the_choice_of_two(loads: list[int], seed: int) -> None:
    fleet = fleet_of([(set(), load) for load in loads])
    chosen = choose(fleet, ("a",), Random(seed), "power-of-two")
    assert sorted(loads).index(fleet.load(chosen)) < len(loads) - 1


@given(REPORTS, REPORTS)
def test_a_second_report_replaces_the_first(
    before: list[tuple[set[str], int]], after: list[tuple[set[str], int]]
) -> None:
    fleet = fleet_of(before)
    for key, (resident, load) in enumerate(after):
        fleet.report(key, resident, load)
    now = (after + before[len(after) :])[: max(len(before), len(after))]
    assert [fleet.load(key) for key in fleet.keys] == [load for _, load in now]
    assert fleet.mean_load == sum(load for _, load in now) / len(now)
    for adapter in "abcdef":
        assert set(fleet.holding(adapter)) == {k for k, (r, _) in enumerate(now) if adapter in r}


@given(REPORTS)
def test_a_removed_replica_leaves_nothing_behind(reports: list[tuple[set[str], int]]) -> None:
    fleet = fleet_of(reports)
    fleet.remove(0)
    assert 0 not in fleet
    assert len(fleet) == len(reports) - 1
    assert all(0 not in fleet.holding(adapter) for adapter in "abcdef")
    if len(fleet):
        assert fleet.mean_load == sum(load for _, load in reports[1:]) / len(fleet)


def test_what_was_sent_counts_until_it_ends() -> None:
    fleet: Fleet[str] = Fleet(("one", "two"))
    fleet.sent("one")
    assert (fleet.load("one"), fleet.mean_load) == (1, 0.5)
    fleet.ended("one")
    fleet.ended("one")  # the replica's report was faster
    assert (fleet.load("one"), fleet.mean_load) == (0, 0.0)


def test_a_holder_that_is_overloaded_spills() -> None:
    fleet = fleet_of([({"a"}, 40), (set(), 0)])
    assert {choose(fleet, ("a",), Random(seed)) for seed in range(20)} == {1}


@given(REPORTS, st.sets(ADAPTERS, min_size=1, max_size=3), st.integers())
def test_an_overloaded_replica_is_chosen_by_nobody_who_has_another(
    reports: list[tuple[set[str], int]], adapters: set[str], seed: int
) -> None:
    fleet = fleet_of(reports)
    chosen = choose(fleet, sorted(adapters), Random(seed))
    assert fleet.load(chosen) <= DEFAULT_SPILL * fleet.mean_load + SLACK


@given(st.lists(st.integers(0, 2), min_size=2, max_size=6), st.text(min_size=1), st.integers())
def test_all_gateways_send_an_adapter_that_is_nowhere_to_the_same_replica(
    loads: list[int], adapter: str, seed: int
) -> None:
    busy, idle = (Fleet(range(len(loads)), slots=4) for _ in range(2))
    for key, load in enumerate(loads):
        busy.queued(key, load)
    home = choose(idle, (adapter,), Random(0))
    assert choose(busy, (adapter,), Random(seed)) == home


def test_adapters_spread_over_empty_replicas() -> None:
    fleet = Fleet(range(4), slots=8)
    homes = Counter(choose(fleet, (f"a{i}",), Random(0)) for i in range(400))
    assert set(homes) == {0, 1, 2, 3}
    assert max(homes.values()) < 1.5 * 100


def test_a_new_replica_takes_over_its_share_alone() -> None:
    three, four = Fleet("abc"), Fleet("abcd")
    moved = 0
    for i in range(400):
        before, after = (choose(fleet, (f"a{i}",), Random(0)) for fleet in (three, four))
        assert after in (before, "d")
        moved += after != before
    assert 60 < moved < 140


def test_an_adapter_that_is_nowhere_goes_to_a_free_slot() -> None:
    fleet: Fleet[str] = Fleet()
    fleet.report("full", [f"a{i}" for i in range(8)], 0, 8)
    fleet.report("free", ["b"], 2, 8)
    assert {choose(fleet, (f"c{i}",), Random(0)) for i in range(40)} == {"free"}
    fleet.report("free", [f"b{i}" for i in range(8)], 0)
    assert {choose(fleet, (f"c{i}",), Random(0)) for i in range(40)} == {"full", "free"}


def test_the_holders_of_part_of_a_mixture_come_before_the_home_of_all() -> None:
    fleet = fleet_of([({"a", "b"}, 40), ({"b"}, 0), (set(), 0), (set(), 0)])
    assert {choose(fleet, ("a", "b"), Random(seed)) for seed in range(20)} == {1}


def test_random_is_uniform() -> None:
    fleet = fleet_of([({"a"}, 0), (set(), 9), (set(), 0)])
    rng = Random(0)
    counts = Counter(choose(fleet, ("a",), rng, "random") for _ in range(3000))
    assert all(900 < counts[key] < 1100 for key in range(3))


def test_an_empty_fleet_is_an_error() -> None:
    with pytest.raises(ValueError, match="no replica"):
        choose(Fleet(), ("a",), Random(0))
