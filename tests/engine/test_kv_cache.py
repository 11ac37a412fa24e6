"""Pages are never lost, doubled or shared with whoever computes something else."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mora_serve.engine.kv_cache import IntegrityError, KVCache, PrefixChain

PAGE = 3


class Holder:
    def __init__(self, tenant: str, mixture: bytes, tokens: list[int]) -> None:
        self.identity = (tenant, mixture)
        self.tokens = tokens
        self.chain = PrefixChain(tenant, mixture)
        self.pages: list[int] = []
        self.computed = 0


class Cache(RuleBasedStateMachine):
    """Random use of the cache against a model that writes what each page should contain."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(pages=9, page_size=PAGE, prefix_cache=True)
        self.holders: list[Holder] = []
        self.content: dict[tuple[int, int], object] = {}

    @rule(
        tenant=st.sampled_from(["a", "b"]),
        mixture=st.sampled_from([b"", b"x"]),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14),
    )
    def start(self, tenant: str, mixture: bytes, tokens: list[int]) -> None:
        holder = Holder(tenant, mixture, tokens)
        holder.pages = self.cache.match(holder.chain, tokens)
        holder.computed = len(holder.pages) * PAGE
        assert holder.computed < len(tokens)
        free, missing = self.cache.free, self.cache.pages_for(len(tokens)) - len(holder.pages)
        before = list(holder.pages)
        fitted = self.cache.extend(holder.pages, len(tokens))
        assert fitted == (missing <= free)
        if not fitted:
            assert holder.pages == before
            self.cache.release(holder.pages)
            return
        self.holders.append(holder)

    @rule(data=st.data(), count=st.integers(1, 6))
    def compute(self, data: st.DataObject, count: int) -> None:
        if not self.holders:
            return
        holder = data.draw(st.sampled_from(self.holders))
        end = min(len(holder.tokens), holder.computed + count)
        for i in range(holder.computed, end):
            slot = holder.pages[i // PAGE], i % PAGE
            self.content[slot] = (*holder.identity, *holder.tokens[: i + 1])
        holder.computed = end
        self.cache.commit(holder.pages, holder.chain, holder.tokens, end)

    @rule(data=st.data(), token=st.integers(0, 1))
    def generate(self, data: st.DataObject, token: int) -> None:
        if not self.holders:
            return
        holder = data.draw(st.sampled_from(self.holders))
        before = list(holder.pages)
        if self.cache.extend(holder.pages, len(holder.tokens) + 1):
            assert holder.pages[: len(before)] == before
            holder.tokens.append(token)

    @rule(data=st.data(), dirty=st.sampled_from([False, False, True]))
    def finish(self, data: st.DataObject, dirty: bool) -> None:
        if not self.holders:
            return
        holder = data.draw(st.sampled_from(self.holders))
        self.holders.remove(holder)
        self.cache.release(holder.pages, dirty)

    @invariant()
    def books_agree(self) -> None:
        self.cache.check_integrity([h.pages for h in self.holders])
        assert self.cache.used == len({p for h in self.holders for p in h.pages})
        assert self.cache.used + self.cache.free == self.cache.usable
        assert all(0 not in h.pages for h in self.holders)

    @invariant()
    def everybody_reads_his_own(self) -> None:
        for h in self.holders:
            for i in range(h.computed):
                expected = (*h.identity, *h.tokens[: i + 1])
                assert self.content[h.pages[i // PAGE], i % PAGE] == expected

    def teardown(self) -> None:
        for holder in self.holders:
            self.cache.release(holder.pages)
        assert (self.cache.used, self.cache.free) == (0, self.cache.usable)
        self.cache.check_integrity()


Cache.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestCache = Cache.TestCase


def filled(
    tokens: list[int], pages: int = 9, prefix_cache: bool = True, tenant: str = "a"
) -> tuple[KVCache, list[int]]:
    """A cache in which ``tokens`` were computed and released."""
    cache = KVCache(pages, PAGE, prefix_cache)
    chain, held = PrefixChain(tenant, b""), []
    assert cache.match(chain, tokens) == []
    assert cache.extend(held, len(tokens))
    cache.commit(held, chain, tokens, len(tokens))
    cache.release(held)
    return cache, held


TOKENS = [1, 2, 3, 4, 5, 6, 7]


def test_the_longest_prefix_is_found_and_one_token_is_left() -> None:
    cache, held = filled(TOKENS)
    assert cache.match(PrefixChain("a", b""), TOKENS) == held[:2]
    assert cache.match(PrefixChain("a", b""), TOKENS[:6]) == held[:1]
    assert cache.match(PrefixChain("a", b""), [1, 2, 3, 9, 5, 6, 7]) == held[:1]
    assert cache.match(PrefixChain("a", b""), [9, 2, 3, 4, 5, 6, 7]) == []


@pytest.mark.parametrize(("tenant", "key"), [("b", b""), ("a", b"x"), ("", b"a")])
def test_nothing_is_shared_with_another_tenant_or_mixture(tenant: str, key: bytes) -> None:
    cache, _ = filled(TOKENS)
    assert cache.match(PrefixChain(tenant, key), TOKENS) == []


def test_the_border_between_tenant_and_mixture_counts() -> None:
    a, b = PrefixChain("ab", b"c"), PrefixChain("a", b"bc")
    assert a.page_hash(0, TOKENS, PAGE) != b.page_hash(0, TOKENS, PAGE)


def test_without_a_prefix_cache_nothing_is_found() -> None:
    cache, _ = filled(TOKENS, prefix_cache=False)
    assert cache.match(PrefixChain("a", b""), TOKENS) == []
    assert cache.cached == 0


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    cache, held = filled(TOKENS, pages=4)
    other: list[int] = []
    assert cache.extend(other, 2 * PAGE)
    assert cache.evictions == 1
    assert cache.match(PrefixChain("a", b""), TOKENS) == held[:1]


def test_dirty_pages_are_forgotten() -> None:
    """Also the shared ones, which stay with whoever still holds them."""
    cache, held = filled(TOKENS, pages=4)
    sick, well = PrefixChain("a", b""), PrefixChain("a", b"")
    first, second = cache.match(sick, TOKENS), cache.match(well, TOKENS)
    cache.release(first, dirty=True)
    assert cache.match(PrefixChain("a", b""), TOKENS) == []
    cache.check_integrity([second])
    cache.release(second)
    assert sorted(second) == sorted(held[:2])
    assert cache.extend([], 3 * PAGE)


def test_every_page_given_away_is_named_for_zeroing() -> None:
    """Fresh, freed and evicted pages alike; pages found by their hash are left as they are."""
    cache, held = filled(TOKENS, pages=4)
    assert cache.take_new() == held
    found = cache.match(PrefixChain("a", b""), TOKENS)
    assert cache.take_new() == []
    cache.release(found)
    other: list[int] = []
    assert cache.extend(other, 3 * PAGE)
    assert sorted(cache.take_new()) == [1, 2, 3]
    assert cache.take_new() == []


def test_what_was_evicted_can_be_found_again_once_recomputed() -> None:
    """A preempted sequence commits its pages anew, with the hashes that it already has."""
    cache, chain, held = KVCache(4, PAGE, True), PrefixChain("a", b""), []
    for _ in range(2):
        held = cache.match(chain, TOKENS)
        assert held == []
        assert cache.extend(held, len(TOKENS))
        cache.commit(held, chain, TOKENS, len(TOKENS))
        cache.release(held)
        assert cache.match(PrefixChain("a", b""), TOKENS) == held[:2]
        cache.release(held[:2])
        other: list[int] = []
        assert cache.extend(other, 3 * PAGE)
        cache.release(other)


def test_each_page_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Committing token by token costs one hash a page, however long the prefix is."""
    from mora_serve.engine import kv_cache

    hashed = 0
    real = kv_cache.hashlib.sha256

    def sha256(data: bytes) -> object:
        nonlocal hashed
        hashed += 1
        return real(data)

    monkeypatch.setattr(kv_cache.hashlib, "sha256", sha256)
    cache, chain, held, tokens = KVCache(400, PAGE, True), PrefixChain("a", b""), [], []
    for token in range(900):
        tokens.append(token)
        assert cache.extend(held, len(tokens))
        cache.commit(held, chain, tokens, len(tokens))
    cache.release(held)
    cache.match(chain, tokens)
    assert hashed == 1 + 300


def test_broken_books_are_reported() -> None:
    cache, held = filled(TOKENS)
    with pytest.raises(IntegrityError, match="references"):
        cache.check_integrity([held])
