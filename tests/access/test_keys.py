"""Keys: only the very secret finds one, and it is compared in constant time."""

from __future__ import annotations

import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.access import keys as module
from mora_serve.access.keys import LONGEST, Key, Keys, bearer, new_secret, sha256_of
from mora_serve.access.roles import Role

SECRETS = [new_secret() for _ in range(8)]
KEYS = Keys(
    Key(f"k{i}", sha256_of(secret), f"t{i}", frozenset(Role)) for i, secret in enumerate(SECRETS)
)


def test_a_secret_finds_its_own_key() -> None:
    for i, secret in enumerate(SECRETS):
        found = KEYS.find(secret)
        assert found is not None
        assert (found.id, found.tenant) == (f"k{i}", f"t{i}")


def test_secrets_are_long_random_and_recognisable() -> None:
    assert len({new_secret() for _ in range(1000)}) == 1000
    assert all(s.startswith("mora_") and len(s) == 48 for s in SECRETS)


@given(st.sampled_from(SECRETS), st.integers(0, 47), st.characters())
def test_a_secret_that_differs_in_a_character_finds_nothing(secret, at, character) -> None:
    other = secret[:at] + character + secret[at + 1 :]
    assert (KEYS.find(other) is None) == (other != secret)


@given(st.text())
def test_other_texts_find_nothing_and_raise_nothing(text: str) -> None:
    assert KEYS.find(text) is None


def test_the_digest_of_a_secret_is_no_secret() -> None:
    """Whoever reads the access file cannot call."""
    assert all(KEYS.find(sha256_of(secret)) is None for secret in SECRETS)


def test_a_very_long_secret_is_not_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "sha256_of", lambda text: pytest.fail("hashed"))
    assert KEYS.find("x" * (LONGEST + 1)) is None


def test_vllm_cve_2025_59425_keys_are_compared_in_constant_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM CVE-2025-59425 compared keys with ``==``, whose time told how much of one was right."""
    compared, whole = [], hmac.compare_digest

    def compare(a: str, b: str) -> bool:
        compared.append((a, b))
        return whole(a, b)

    monkeypatch.setattr(module.hmac, "compare_digest", compare)
    digest = sha256_of("x")
    near = Key("near", digest[:4] + "0" * 60, "t", frozenset(Role))
    keys = Keys([near, Key("right", digest, "t", frozenset(Role))])
    found = keys.find("x")
    assert found is not None
    assert found.id == "right"
    assert compared == [(near.sha256, digest), (digest, digest)]
    assert keys.find("y") is None  # what was presented is hashed before anything is compared


@pytest.mark.parametrize(
    ("value", "secret"),
    [
        ("Bearer abc", "abc"),
        ("bearer  abc ", "abc"),
        ("Basic abc", None),
        ("Bearer ", None),
        ("abc", None),
        (b"Bearer abc", None),
    ],
)
def test_a_key_comes_as_a_bearer_token(value, secret) -> None:
    assert bearer({"authorization": value}) == secret


def test_without_authorization_there_is_no_key() -> None:
    assert bearer({"x-api-key": "abc"}) is None
