"""The router: vectors and keys."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_serve.errors import FailedPrecondition
from mora_serve.router.router import Router
from tests.router.make import DIMS, FINGERPRINT, fitted, prompts, router, tiny

texts = st.lists(st.text(max_size=40), max_size=6)


def bits(key: object) -> dict[str, object]:
    values = {f: getattr(key, f) for f in ("impostor_mean", "impostor_std", "own")}
    return values | {"prototype": key.prototype.tobytes()}  # type: ignore[attr-defined]


def test_a_router_of_another_base_is_refused_and_both_are_named() -> None:
    with pytest.raises(FailedPrecondition, match=r"base-1.*base-2") as e:
        Router.load(fitted(), "base-2")
    assert e.value.field == "router.fingerprint"


def test_a_router_without_a_base_fits_any_and_an_unknown_base_takes_any() -> None:
    free = dataclasses.replace(tiny(), fingerprint="").to_bytes()
    assert Router.load(free, "base-2").content.fingerprint == ""
    assert Router.load(fitted(), "").content.fingerprint == FINGERPRINT


@given(st.text(max_size=100))
def test_a_text_is_a_unit_vector_or_zeros_and_always_the_same(text: str) -> None:
    z = router().embed(text)
    assert z.shape == (DIMS,)
    assert z.dtype == np.float32
    assert np.linalg.norm(z) == pytest.approx(1.0, abs=1e-4) or not z.any()
    assert (z == router().embed(text)).all()


def test_embedding_is_whitening_of_the_features() -> None:
    content = router().content
    text = "reverse 'kavo' and tell me"
    z = (content.features.dense([text])[0] - content.mean) @ content.projection
    assert np.allclose(router().embed(text), z / np.linalg.norm(z), atol=1e-5)


@settings(max_examples=30)
@given(texts, st.randoms(use_true_random=False))
def test_a_key_does_not_depend_on_the_order_or_the_repetition_of_prompts(prompts, rng) -> None:
    key = router().key(prompts)
    shuffled = [*prompts, *prompts[:2]]
    rng.shuffle(shuffled)
    again = router().key(shuffled)
    assert (key is None) == (again is None)
    if key is not None:
        assert bits(key) == bits(again)


def test_prompts_without_a_feature_give_no_key() -> None:
    assert router().key([]) is None
    assert router().key(["", "?!"]) is None
    assert bits(router().key(["", "spell 'kavo'"])) == bits(router().key(["spell 'kavo'"]))


def test_a_key_is_the_direction_of_its_prompts_and_nearer_to_them_than_to_impostors() -> None:
    key = router().key(prompts("json", 3, 16))
    assert np.linalg.norm(key.prototype) == pytest.approx(1.0, abs=1e-5)
    own = np.mean([router().embed(p) @ key.prototype for p in prompts("json", 9, 30)])
    assert own == pytest.approx(key.own, abs=0.15)
    assert key.impostor_mean + 3 * key.impostor_std < key.own
    assert key.impostor_std >= DIMS**-0.5


def test_the_own_score_of_few_prompts_leans_on_the_fitted_coherence() -> None:
    coherence = router().calibration.coherence
    assert router().key(prompts("json", 3, 1)).own == pytest.approx(coherence)
    owns = [router().key(prompts("json", 3, n)).own for n in (1, 4, 16)]
    assert owns == sorted(owns)


def test_prompts_that_contradict_each_other_still_give_a_usable_key() -> None:
    content = router().content
    opposed = np.stack([content.impostors[0], -content.impostors[0]])
    key = router().key_of(opposed)
    assert np.isfinite([key.own, key.impostor_mean, key.impostor_std]).all()
    assert key.own > key.impostor_mean
