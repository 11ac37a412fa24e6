"""Decisions under load against those of each router alone."""

from __future__ import annotations

import dataclasses

from benchmarks.router_swap import Seen
from mora_serve.core import AdapterWeight, Candidate, Decision, Mixture, Source


def decision(digest: str, *scores: float) -> Decision:
    """A decision of a router that gives adapters a, b, ... these scores, and picks the first."""
    candidates = [Candidate(name, score, score) for name, score in zip("abc", scores, strict=False)]
    return Decision(
        Mixture((AdapterWeight("a", 1.0, "d"),)), Source.ROUTER, tuple(candidates), digest
    )


ONE, TWO = decision("one", 0.9, 0.5), decision("two", 0.8, 0.4)


def seen(*decisions: Decision) -> Seen:
    made = Seen({"one": {"x": ONE}, "two": {"x": TWO}})
    for d in decisions:
        made.take("x", d)
    return made


def test_decisions_of_either_router_are_right() -> None:
    got = seen(ONE, TWO, ONE)
    assert (got.count, got.wrong, got.keys, got.foreign_keys) == (3, 0, 6, 0)
    assert got.decisions == {"one": 2, "two": 1}


def test_a_key_of_the_other_router_shows() -> None:
    mixed = dataclasses.replace(ONE, candidates=(ONE.candidates[0], TWO.candidates[1]))
    got = seen(mixed)
    assert (got.wrong, got.foreign_keys) == (1, 1)


def test_a_decision_under_the_other_routers_digest_is_wrong() -> None:
    got = seen(dataclasses.replace(ONE, router_digest="two"))
    assert (got.wrong, got.foreign_keys) == (1, 2)


def test_a_third_router_is_wrong() -> None:
    assert seen(dataclasses.replace(ONE, router_digest="three")).wrong == 1


def test_another_choice_from_the_same_scores_is_wrong() -> None:
    got = seen(dataclasses.replace(ONE, mixture=Mixture()))
    assert (got.wrong, got.foreign_keys) == (1, 0)
