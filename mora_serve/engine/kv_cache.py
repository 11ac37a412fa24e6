"""Which page of the key/value cache belongs to whom: accounting only, no tensors.

Page 0 is reserved: it is always zeros and pads page tables. A full page may be found again by
its hash, a SHA-256 chained over tenant, mixture and all tokens up to its end, so that nothing
is ever shared between tenants or mixtures.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class IntegrityError(Exception):
    """The bookkeeping contradicts itself: a bug, never the caller's fault. For the log only."""


class PrefixChain:
    """The page hashes of one growing token list, each computed once.

    ``committed`` counts the leading pages that the cache already knows of.
    """

    __slots__ = ("_hashes", "_root", "committed")

    def __init__(self, tenant: str, mixture_key: bytes) -> None:
        name = tenant.encode()
        self._root = hashlib.sha256(len(name).to_bytes(8, "little") + name + mixture_key).digest()
        self._hashes: list[bytes] = []
        self.committed = 0

    def page_hash(self, index: int, tokens: Sequence[int], page_size: int) -> bytes:
        """Hash of full page ``index`` of ``tokens``, which may only have grown since."""
        hashes = self._hashes
        while len(hashes) <= index:
            start = len(hashes) * page_size
            page = array("q", tokens[start : start + page_size])
            last = hashes[-1] if hashes else self._root
            hashes.append(hashlib.sha256(last + page.tobytes()).digest())
        return hashes[index]


class KVCache:
    """Reference counts of ``pages`` pages of ``page_size`` tokens, and the prefix cache.

    The page list of a sequence only grows while it is held, so a page table made from it stays
    valid: when two sequences compute the same page at the same time, both keep their own and
    the first to commit is the one that later requests find.
    """

    def __init__(self, pages: int, page_size: int, prefix_cache: bool) -> None:
        self.pages = pages
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        self.prefix_queries = 0  # tokens looked up, see count()
        self.prefix_hits = 0  # of these, found
        self.evictions = 0  # cached pages given to somebody else
        self._refs = [0] * pages
        self._used = 0
        self._free = list(range(pages - 1, 0, -1))
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()  # cached, unreferenced, LRU first
        self._new: list[int] = []  # given away since take_new()

    @property
    def usable(self) -> int:
        """Pages that can hold tokens."""
        return self.pages - 1

    @property
    def free(self) -> int:
        """Pages that ``extend`` can give: empty ones and cached ones that nobody uses."""
        return len(self._free) + len(self._evictable)

    @property
    def used(self) -> int:
        """Pages that somebody references."""
        return self._used

    @property
    def cached(self) -> int:
        """Pages that a prefix lookup can find."""
        return len(self._hash_of)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold ``tokens`` tokens."""
        return -(-tokens // self.page_size)

    def match(self, chain: PrefixChain, tokens: Sequence[int]) -> list[int]:
        """Pages of the longest cached prefix, each now referenced by the caller.

        At least the last token is left to compute: its logits are wanted.
        """
        found: list[int] = []
        if self.prefix_cache:
            for index in range((len(tokens) - 1) // self.page_size):
                page = self._page_of.get(chain.page_hash(index, tokens, self.page_size))
                if page is None:
                    break
                found.append(page)
        for page in found:
            if self._refs[page] == 0:
                del self._evictable[page]
                self._used += 1
            self._refs[page] += 1
        chain.committed = len(found)
        return found

    def count(self, queried: int, hit: int) -> None:
        """Add one request's lookup to the statistics (a lookup may be tried many times)."""
        self.prefix_queries += queried
        self.prefix_hits += hit

    def extend(self, pages: list[int], tokens: int) -> bool:
        """Append pages until ``tokens`` fit; False, with nothing changed, when too few are free."""
        missing = self.pages_for(tokens) - len(pages)
        if missing > self.free:
            return False
        for _ in range(missing):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._evictable.popitem(last=False)
                self._forget(page)
                self.evictions += 1
            self._refs[page] = 1
            self._used += 1
            pages.append(page)
            self._new.append(page)
        return True

    def take_new(self) -> list[int]:
        """Pages given away since the last call, which the caller zeroes before it reads them.

        Attention reads whole pages and masks what is beyond the end; what the last owner left
        there must be finite, since 0 x NaN is NaN, and only zeros surely are: a request that ends
        before its first token may leave anything.
        """
        new, self._new = self._new, []
        return new

    def commit(
        self, pages: Sequence[int], chain: PrefixChain, tokens: Sequence[int], computed: int
    ) -> None:
        """Make the full pages among the first ``computed`` tokens findable."""
        if not self.prefix_cache:
            return
        for index in range(chain.committed, computed // self.page_size):
            digest = chain.page_hash(index, tokens, self.page_size)
            if digest not in self._page_of:
                self._page_of[digest] = pages[index]
                self._hash_of[pages[index]] = digest
            chain.committed = index + 1

    def release(self, pages: Sequence[int], dirty: bool = False) -> None:
        """Drop one reference each. Cached pages stay findable until somebody needs the room.

        ``dirty``: the pages hold what nobody should find, and are forgotten at once. The end of
        a chain becomes the first to be evicted: without its beginning the rest could not be found.
        """
        for page in reversed(pages):
            if dirty:
                self._forget(page)
            self._refs[page] -= 1
            if self._refs[page]:
                continue
            self._used -= 1
            if page in self._hash_of:
                self._evictable[page] = None
            else:
                self._free.append(page)

    def reset(self) -> None:
        """Begin the books anew: every page is free, and nothing can be found."""
        self._refs = [0] * self.pages
        self._used = 0
        self._free = list(range(self.pages - 1, 0, -1))
        self._page_of, self._hash_of = {}, {}
        self._evictable.clear()
        self._new.clear()

    def check_integrity(self, held: Iterable[Sequence[int]] = ()) -> None:
        """Raise IntegrityError unless exactly the page lists in ``held`` account for every page."""
        expected = Counter(page for pages in held for page in pages)
        actual = {page: refs for page, refs in enumerate(self._refs) if refs}
        if expected != actual:
            raise IntegrityError(f"references: held {dict(expected)}, counted {actual}")
        if len(actual) != self._used:
            raise IntegrityError(f"used is {self._used}, referenced pages are {len(actual)}")
        places = [*actual, *self._free, *self._evictable]
        if sorted(places) != list(range(1, self.pages)):
            raise IntegrityError(f"pages lost, doubled or out of range: {sorted(places)}")
        if {p: d for d, p in self._page_of.items()} != self._hash_of:
            raise IntegrityError("pages and hashes are not one to one")
        if not set(self._evictable) <= set(self._hash_of):
            raise IntegrityError("an evictable page has no hash")
        if set(self._free) & set(self._hash_of):
            raise IntegrityError("a free page can be found by its hash")

    def _forget(self, page: int) -> None:
        digest = self._hash_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]
