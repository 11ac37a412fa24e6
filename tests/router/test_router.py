"""The router: vectors and keys."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_serve.errors import FailedPrecondition, InvalidArgument
from mora_serve.router import router as router_module
from mora_serve.router.counting import sorted_words
from mora_serve.router.features import Features, PooledHidden
from mora_serve.router.router import Router, beside
from tests.router.make import DIMS, FINGERPRINT, fitted, prompts, router, tiny, vectors

texts = st.lists(st.text(max_size=40), max_size=6)


def bits(key: object) -> dict[str, object]:
    values = {f: getattr(key, f).tobytes() for f in ("centre", "prototypes")}
    return values | {"words": key.words}  # type: ignore[attr-defined]


def test_a_router_of_another_base_is_refused_and_both_are_named() -> None:
    with pytest.raises(FailedPrecondition, match=r"base-1.*base-2") as e:
        Router.load(fitted(), "base-2")
    assert e.value.field == "router.fingerprint"


def test_a_router_on_hidden_states_has_to_name_its_base() -> None:
    content = tiny(hidden=PooledHidden(1, 6))
    assert Router.load(content.to_bytes(), FINGERPRINT).hidden == PooledHidden(1, 6)
    free = dataclasses.replace(content, fingerprint="").to_bytes()
    for fingerprint in (FINGERPRINT, ""):
        with pytest.raises(FailedPrecondition, match="fingerprint") as e:
            Router.load(free, fingerprint)
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


def test_a_key_is_the_direction_of_its_prompts() -> None:
    key = router().key(prompts("json", 3, 16))
    assert np.linalg.norm(key.centre) == pytest.approx(1.0, abs=1e-5)
    assert key.prototypes.shape == (router().content.prototypes, DIMS)

    def nearest(task: str) -> float:
        asked = np.stack([router().embed(p) for p in prompts(task, 9, 30)])
        return float((asked @ key.prototypes.T).max(1).mean())

    assert nearest("json") > 0.3 + max(nearest("reverse"), nearest("polite"))


def test_a_key_knows_the_words_of_its_prompts_and_not_their_data() -> None:
    words = router().content.features.ngrams.words
    key = router().key(["reverse 'kavo'", "turn it around"])
    assert key.words == set(words("reverse turn it around"))


def test_a_key_keeps_the_commonest_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "MAX_WORDS", 2)
    words = router().content.features.ngrams.words
    key = router().key(["reverse it", "reverse this", "reverse it now"])
    assert key.words == set(words("reverse it"))


def test_the_rest_of_a_prompt_is_what_an_adapter_does_not_say() -> None:
    key = router().key(["as json", "in json"])
    rest = router().rest("reverse 'kavo', as json", sorted_words(key.words))
    assert np.allclose(rest, router().embed("reverse 'kavo'"), atol=1e-6)
    nothing = router().rest("as json: 'kavo'", sorted_words(key.words))
    assert not nothing.any()


def test_prompts_that_contradict_each_other_still_give_a_usable_key() -> None:
    (axis,) = vectors(0, 1, DIMS)
    key = router().key_of(np.stack([axis, -axis]))
    assert np.isfinite(key.centre).all()
    assert np.isfinite(key.prototypes).all()


HIDDEN = Router(tiny(hidden=PooledHidden(1, 6)))


def states(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 6)).astype(np.float32)


def test_embedding_is_whitening_of_n_grams_and_hidden_state_alike() -> None:
    content = HIDDEN.content
    (state,) = states(1)
    z = (content.features.dense(["spell"], state[None])[0] - content.mean) @ content.projection
    assert np.allclose(HIDDEN.embed("spell", state), z / np.linalg.norm(z), atol=1e-5)
    assert (HIDDEN.embed("spell", state) != HIDDEN.embed("spell", -state)).any()


def test_a_state_that_is_missing_is_refused() -> None:
    for work in (lambda: HIDDEN.embed("spell"), lambda: HIDDEN.key(["spell", "it"])):
        with pytest.raises(InvalidArgument):
            work()


@settings(max_examples=30)
@given(texts, st.randoms(use_true_random=False))
def test_states_stay_with_their_prompts_whatever_the_order(prompts, rng) -> None:
    by_text = dict(zip(prompts, states(len(prompts)), strict=True))
    key = HIDDEN.key(by_text, list(by_text.values()))
    shuffled = [*by_text, *list(by_text)[:2]]
    rng.shuffle(shuffled)
    again = HIDDEN.key(shuffled, [by_text[text] for text in shuffled])
    assert (key is None) == (again is None)
    if key is not None:
        assert bits(key) == bits(again)


def test_the_rest_of_hidden_states_is_what_no_prototype_spans() -> None:
    router = Router(dataclasses.replace(tiny(hidden=PooledHidden(1, 6)), **only_hidden()))
    key = router.key_of(vectors(1, 2, 8))
    assert (key.prototypes[1] == key.prototypes[2]).all()  # of two prompts the last is repeated
    (z,) = vectors(2, 1, 8)
    rest = beside(z, key.prototypes)
    assert np.allclose(key.prototypes @ rest, 0, atol=1e-5)
    plane, _ = np.linalg.qr(key.prototypes[:2].T)
    expected = z - plane @ (plane.T @ z)
    assert np.allclose(rest, expected / np.linalg.norm(expected), atol=1e-5)
    assert np.linalg.norm(rest) == pytest.approx(1.0, abs=1e-5)


def only_hidden() -> dict[str, object]:
    """What makes ``tiny`` a router without n-grams."""
    content = tiny(hidden=PooledHidden(1, 6))
    return {
        "features": Features(None, content.features.hidden),
        "mean": content.mean[64:],
        "codes": content.codes[:, 64:],
    }
