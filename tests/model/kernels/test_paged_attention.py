"""Paged attention for decode rows and chunks of prompts, against model/attention.py."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from mora_serve.model.attention import KVPages, PagedAttention, Prefill, prefill_mask
from mora_serve.model.kernels import paged_attention
from mora_serve.model.kernels.paged_attention import (
    SPLIT,
    DecodeScratch,
    decode_attention,
    prefill_attention,
)
from tests.model.kernels.compare import DTYPES, assert_close, same_bits

NAN = float("nan")
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    dim: int
    page: int
    lengths: tuple[int, ...]  # tokens of each row
    window: int | None = None


CASES = [
    Case(4, 4, 16, 4, (1, 3, 4, 5, 60)),
    Case(6, 2, 20, 16, (64, 1, 65)),
    Case(8, 1, 32, 8, (7, SPLIT + 1)),
    Case(14, 2, 64, 16, (3 * SPLIT - 5, 33), window=300),
    Case(2, 1, 16, 16, (70, 9), window=5),
    Case(3, 1, 256, 16, (40,)),
]


def random_case(seed: int) -> Case:
    r = random.Random(seed)
    kv_heads = r.choice((1, 2, 3))
    lengths = tuple(r.randint(1, 90) for _ in range(r.randint(1, 3)))
    dim, page = r.choice((2, 18, 48, 80)), r.choice((4, 8, 32))
    return Case(kv_heads * r.randint(1, 8), kv_heads, dim, page, lengths, r.choice((None, 1, 40)))


class Pages:
    """One layer's pages with random rows in them, scattered; the other places hold ``rest``."""

    def __init__(self, case: Case, dtype, device, rest: float = 0.0, seed: int = 0) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        g = torch.Generator().manual_seed(seed)
        needed = [-(-length // case.page) for length in case.lengths]
        pages = sum(needed) + 3
        self.kv = KVPages(2, case.kv_heads, case.dim, pages, case.page, dtype, device)
        self.keys, self.values = self.kv.k[1], self.kv.v[1]
        self.keys.fill_(rest)
        self.values.fill_(rest)
        order = list(range(1, pages))
        random.Random(seed).shuffle(order)
        self.table = torch.zeros(len(needed), max(needed) + 1, dtype=torch.int32)
        for row, (count, length) in enumerate(zip(needed, case.lengths, strict=True)):
            own = [order.pop() for _ in range(count)]
            self.table[row, :count] = torch.tensor(own, dtype=torch.int32)
            places = [own[i // case.page] * case.page + i % case.page for i in range(length)]
            for store in (self.keys, self.values):
                new = torch.randn(case.kv_heads, length, case.dim, generator=g)
                store.flatten(1, 2)[:, places] = new.to(device, dtype)
        self.table = self.table.to(device)
        self.q = self.random(len(needed), g)

    def clean(self) -> None:
        """Zeros where there was NaN, for the reference."""
        for pages in (self.keys, self.values):
            pages.nan_to_num_(0.0)

    def random(self, tokens: int, g: torch.Generator) -> torch.Tensor:
        shape = (tokens, self.case.heads, self.case.dim)
        return torch.randn(shape, generator=g).to(self.device, self.dtype)

    def ints(self, numbers) -> torch.Tensor:
        return torch.tensor(list(numbers), dtype=torch.int32, device=self.device)

    def decode(self, rows=None, lengths=None, spoilt_scratch: bool = True) -> torch.Tensor:
        """Attention of some rows, all by default, with a scratch that holds NaN before."""
        rows = list(range(len(self.q))) if rows is None else rows
        case = self.case
        scratch = DecodeScratch.of(
            len(rows) + 1, case.heads, case.dim, self.table.shape[1] * case.page, self.device
        )
        for tensor in (scratch.parts, scratch.top, scratch.total):
            tensor.fill_(NAN)
        lengths = [case.lengths[r] for r in rows] if lengths is None else lengths
        out = torch.full_like(self.q[rows], NAN)
        table = self.table[rows].contiguous()
        q = self.q[rows].contiguous()
        given = (q, self.keys, self.values, table, self.ints(lengths), case.window, out, scratch)
        decode_attention(*given)
        return out

    def decode_reference(self) -> torch.Tensor:
        lengths = torch.tensor(self.case.lengths, device=self.device)
        none = torch.zeros(0, dtype=torch.long, device=self.device)
        attention = PagedAttention(self.kv, none, self.table.long(), lengths, [], self.case.window)
        return attention._decode(self.keys, self.values, self.q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_rows_attend_as_the_reference(case, dtype, device):
    pages = Pages(case, dtype, device)
    assert_close(pages.decode(), pages.decode_reference(), steps=2)


def test_long_rows_share_the_splits_there_are(device, monkeypatch):
    monkeypatch.setattr(paged_attention, "SPLITS", 2)
    pages = Pages(CASES[3], torch.float32, device)
    assert_close(pages.decode(), pages.decode_reference())


@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_what_a_row_may_not_see_cannot_spread(case, device):
    """Free pages, page 0 and the rest of the last page hold NaN, and no bit changes."""
    sound = Pages(case, torch.float32, device).decode()
    assert same_bits(Pages(case, torch.float32, device, rest=NAN).decode(), sound)


def test_keys_before_the_window_are_not_read(device):
    case = CASES[3]
    pages = Pages(case, torch.float32, device)
    sound = pages.decode()
    for row, length in enumerate(case.lengths):
        for position in range(max(length - case.window, 0)):
            page = pages.table[row, position // case.page]
            pages.keys[:, page, position % case.page] = NAN
            pages.values[:, page, position % case.page] = NAN
    assert same_bits(pages.decode(), sound)


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_a_row_s_bits_do_not_depend_on_its_batch(case, device):
    pages = Pages(case, torch.bfloat16, device)
    together = pages.decode()
    assert same_bits(pages.decode(), together)
    for row in range(len(case.lengths)):
        assert same_bits(pages.decode([row])[0], together[row])


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_rows_of_length_zero_get_zeros(case, device):
    """They pad the bucket of a CUDA graph."""
    pages = Pages(case, torch.float32, device)
    out = pages.decode(lengths=[0, *case.lengths[1:]])
    assert not out[0].any()
    assert same_bits(out[1:], pages.decode()[1:])


def test_a_row_of_nan_harms_no_other_row(device):
    pages = Pages(CASES[3], torch.float32, device)
    sound = pages.decode()
    pages.q[0] = NAN
    out = pages.decode()
    assert out[0].isnan().all()
    assert same_bits(out[1], sound[1])


# Chunks of the rows of a case: (tokens before the chunk, tokens of the chunk); 0 pads a bucket.
CHUNKS = [
    (CASES[0], [(0, 1), (1, 2), (0, 4), (0, 0), (9, 51)]),
    (CASES[1], [(0, 64), (0, 1), (40, 25)]),
    (CASES[2], [(2, 5), (60, SPLIT - 59)]),
    (Case(14, 2, 64, 16, (250, 33), window=100), [(150, 100), (0, 33)]),
    (CASES[4], [(30, 40), (0, 9)]),
    (CASES[5], [(0, 40)]),
]


def prefill(pages: Pages, chunks, q: torch.Tensor, starts) -> torch.Tensor:
    out = torch.full_like(q, 7.0)
    prefill_attention(
        q,
        pages.keys,
        pages.values,
        pages.table,
        pages.ints(starts),
        pages.ints(context for context, _ in chunks),
        pages.ints(length for _, length in chunks),
        max(length for _, length in chunks) + 3,
        pages.case.window,
        out,
    )
    return out


def layout(pages: Pages, chunks):
    """Queries, and where each chunk starts: two rows before the first and after each."""
    starts, at = [], 2
    for _, length in chunks:
        starts.append(at)
        at += length + 2
    return pages.random(at, torch.Generator().manual_seed(1)), starts


def prefill_reference(pages: Pages, chunks, q: torch.Tensor, starts) -> torch.Tensor:
    case, out = pages.case, torch.full_like(q, 7.0)
    group = case.heads // case.kv_heads
    none = torch.zeros(0, dtype=torch.long, device=q.device)
    attention = PagedAttention(pages.kv, none, none[None], none, [], case.window)
    for row, ((context, length), start) in enumerate(zip(chunks, starts, strict=True)):
        if length:
            rows = slice(start, start + length)
            mask = prefill_mask(context, length, group, case.window, q.device)
            chunk = Prefill(rows, context, pages.table[row].long(), mask)
            out[rows] = attention._prefill(pages.keys, pages.values, q[rows], chunk)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "chunks"), CHUNKS, ids=str)
def test_chunks_attend_as_the_reference(case, chunks, dtype, device):
    """All of them in one launch; rows of no chunk are left as they are."""
    pages = Pages(case, dtype, device)
    q, starts = layout(pages, chunks)
    expected = prefill_reference(pages, chunks, q, starts)
    assert_close(prefill(pages, chunks, q, starts), expected, steps=2)


@pytest.mark.parametrize(("case", "chunks"), CHUNKS[:5], ids=str)
def test_what_a_chunk_may_not_see_cannot_spread(case, chunks, device):
    sound = Pages(case, torch.float32, device)
    spoilt = Pages(case, torch.float32, device, rest=NAN)
    q, starts = layout(sound, chunks)
    expected = prefill(sound, chunks, q, starts)
    rows = torch.ones(len(q), dtype=torch.bool)
    for start, (_, length) in zip(starts, chunks, strict=True):
        rows[start : start + length] = False
    q[rows.to(device)] = NAN
    assert same_bits(prefill(spoilt, chunks, q, starts), expected)


def test_a_chunk_s_bits_do_not_depend_on_its_batch(device):
    case, chunks = CHUNKS[1]
    pages = Pages(case, torch.bfloat16, device)
    q, starts = layout(pages, chunks)
    together = prefill(pages, chunks, q, starts)
    assert same_bits(prefill(pages, chunks, q, starts), together)
    for row, (start, (context, length)) in enumerate(zip(starts, chunks, strict=True)):
        alone = [(context, length if r == row else 0) for r in range(len(chunks))]
        rows = slice(start, start + length)
        assert same_bits(prefill(pages, alone, q, starts)[rows], together[rows])


def test_a_prompt_s_last_token_attends_alike_in_decode_and_in_prefill(device):
    case = Case(4, 2, 32, 8, (50,))
    pages = Pages(case, torch.float32, device)
    assert_close(prefill(pages, [(49, 1)], pages.q, [0]), pages.decode())


def test_scores_beyond_the_range_of_exp_do_not_overflow(device):
    """Scores of about 1000, whose own rounding is 100 times that of the result."""
    pages = Pages(CASES[3], torch.float32, device)
    pages.q *= 300
    assert_close(pages.decode(), pages.decode_reference(), steps=100)
    chunks = [(length - 1, 1) for length in pages.case.lengths]
    assert_close(prefill(pages, chunks, pages.q, [0, 1]), pages.decode_reference(), steps=100)


@pytest.mark.parametrize("seed", range(5))
def test_random_shapes_attend_as_the_reference(seed, device):
    case = random_case(seed)
    pages = Pages(case, torch.float32, device, rest=NAN)
    cuts = [random.Random(seed).randint(0, length) for length in case.lengths]
    chunks = [(cut, length - cut) for cut, length in zip(cuts, case.lengths, strict=True)]
    q, starts = layout(pages, chunks)
    out, decoded = prefill(pages, chunks, q, starts), pages.decode()
    pages.clean()
    assert_close(decoded, pages.decode_reference())
    assert_close(out, prefill_reference(pages, chunks, q, starts))


LARGE = Case(32, 8, 128, 16, (1, 900, 4096, 17, 2500))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sizes_of_a_large_model(window, dtype, device):
    case = Case(
        *(getattr(LARGE, name) for name in ("heads", "kv_heads", "dim", "page", "lengths")), window
    )
    pages = Pages(case, dtype, device)
    assert_close(pages.decode(), pages.decode_reference(), steps=2)
    chunks = [(0, 1), (388, 512), (0, 4096), (0, 17), (2400, 100)]
    q, starts = layout(pages, chunks)
    expected = prefill_reference(pages, chunks, q, starts)
    assert_close(prefill(pages, chunks, q, starts), expected, steps=2)
