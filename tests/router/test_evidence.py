"""Evidence: the best candidate by the whole prompt, the others by what it leaves."""

from __future__ import annotations

import numpy as np
import pytest

from mora_serve.router import evidence as evidence_module
from mora_serve.router import index as index_module
from mora_serve.router.evidence import Evidence, gather
from mora_serve.router.index import Index
from mora_serve.router.rows import Entry
from router_training.demo.tasks import TASKS
from tests.router.make import prompts, router

PAIR = "reverse 'kavoja', as json"


def index(*names: str) -> Index:
    keys = {name: router().key(prompts(name, 3, 16)) for name in names}
    return Index.of(("t", Entry(n, k, TASKS[n].group)) for n, k in keys.items() if k)


def seen(text: str, *names: str, asked: list[str] | None = None) -> Evidence:
    found = gather(router(), index(*(names or tuple(TASKS))), "t", text, names=asked)
    assert found is not None
    return found


def test_nobody_is_no_evidence() -> None:
    assert gather(router(), Index(), "t", PAIR) is None
    assert gather(router(), index("reverse"), "t", PAIR, names=["roman"]) is None


def test_both_adapters_of_a_pair_come_first() -> None:
    assert set(seen(PAIR).names[:2]) == {"reverse", "json"}


def test_the_first_input_is_the_cosine_with_the_nearest_prototype() -> None:
    found = seen("reverse 'kavoja'")
    key = router().key(prompts("reverse", 3, 16))
    assert found.names[0] == "reverse"
    nearest = (key.prototypes @ router().embed("reverse 'kavoja'")).max()
    assert found.first == pytest.approx([nearest], abs=5e-3)


def test_scores_blend_the_centre_and_the_nearest_prototype() -> None:
    found = seen("reverse 'kavoja'", "reverse", "json")
    z, blend = router().embed("reverse 'kavoja'"), router().calibration.blend
    for name, score in zip(found.names, found.score, strict=True):
        key = router().key(prompts(name, 3, 16))
        nearest = (key.prototypes @ z).max()
        assert score == pytest.approx((1 - blend) * (key.centre @ z) + blend * nearest, abs=5e-3)


def test_the_second_of_a_pair_scores_on_the_rest_as_on_a_prompt_of_its_own() -> None:
    pair = seen(PAIR)
    first, second = pair.names[:2]
    alone = seen({"reverse": "reverse 'kavoja'", "json": "as json"}[second])
    assert alone.names[0] == second
    assert pair.further[0, 0] == pytest.approx(alone.score[0], abs=0.25)
    single = seen({"reverse": "reverse 'kavoja'", "json": "'kavoja' as json"}[first])
    assert single.further[:, 0].max() < 0.5 * pair.further[0, 0]


def test_leads_are_over_the_next_best_and_behind_the_best() -> None:
    rest, lead = seen(PAIR).further.T
    assert (np.diff(rest) <= 0).all()
    assert lead[0] == pytest.approx(rest[0] - rest[1])
    assert lead[1:] == pytest.approx(rest[1:] - rest[0])


def test_a_candidate_alone_has_nobody_beside_it() -> None:
    found = seen(PAIR, "reverse")
    assert found.further.shape == (0, 2)
    assert seen(PAIR, "reverse", "json").further.shape == (1, 2)


def test_whoever_the_rest_is_for_is_found_though_the_whole_prompt_does_not_show_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evidence_module, "FOUND", 1)
    monkeypatch.setattr(index_module.Index.candidates, "__defaults__", (None, 1, frozenset()))
    assert set(seen(PAIR).names) == {"reverse", "json"}


@pytest.mark.parametrize("turn", [1, -1])
def test_the_best_stays_first_wherever_those_found_later_are_registered(
    monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    names = list(TASKS)[::turn]
    best = seen(PAIR, *names).names[0]
    monkeypatch.setattr(evidence_module, "FOUND", 1)
    monkeypatch.setattr(index_module.Index.candidates, "__defaults__", (None, 1, frozenset()))
    assert seen(PAIR, *names).names[0] == best


def test_a_text_without_features_scores_nothing() -> None:
    found = seen("?!")
    assert not found.score.any()
    assert not found.further.any()
    assert list(found.names[1:]) == sorted(found.names[1:])
