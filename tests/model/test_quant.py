"""Fused weights of both kinds: what is stacked is what is multiplied and dequantised."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_serve.model import quant
from mora_serve.model.footprint import can_quantise
from mora_serve.model.quant import DenseWeight, NF4Weight, fuse, product, quantise

COLUMNS = 64


def part(rows: int, seed: int) -> NF4Weight | DenseWeight:
    weight = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed))
    return quantise(weight) if can_quantise(rows, COLUMNS) else DenseWeight(weight)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.sampled_from((8, 16, 32, 64)), min_size=1, max_size=5), data=st.data())
def test_fused_parts_are_the_rows_of_all_in_order(rows, data):
    """Whatever the kinds: every range of rows, and the product, as of the parts one by one."""
    parts = [part(n, i) for i, n in enumerate(rows)]
    linear = fuse(parts)
    whole = torch.cat([p.dequantise(torch.float32) for p in parts])
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    assert torch.equal(linear.dequantise(torch.float32, start, stop), whole[start:stop])
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(linear.matmul(x), x @ whole.T)
    assert linear.nbytes == sum(p.nbytes for p in parts)


@given(rows=st.lists(st.sampled_from((8, 32)), min_size=1, max_size=6))
@settings(max_examples=20, deadline=None)
def test_neighbours_of_one_kind_become_one_product(rows):
    kinds = [type(part(n, 0)) for n in rows]
    changes = sum(a is not b for a, b in itertools.pairwise(kinds))
    assert len(fuse([part(n, i) for i, n in enumerate(rows)]).parts) == 1 + changes


def test_shapes_that_the_kernels_cannot_take_are_told():
    assert can_quantise(32, 64)
    assert not can_quantise(16, 64)
    assert not can_quantise(32, 96)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("columns", [128, 192])
def test_equal_rows_give_equal_bits_in_a_batch_of_any_size(threads, columns):
    """Where a row stands in the batch changes nothing, on one thread and on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weight = torch.randn(320, columns)
        for rows in (*range(2, 40), 63, 100, 129):
            y = product(torch.randn(1, columns).repeat(rows, 1), weight)
            assert torch.equal(y, y[:1].expand_as(y)), rows
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_bitsandbytes_the_numbers_are_the_same(dtype, monkeypatch):
    """To the bit, however few rows are taken at a time."""
    w = quantise(torch.randn(12, 192, generator=torch.Generator().manual_seed(3)))
    large = NF4Weight(w.codes, w.absmax[:, :1].contiguous())  # a block of 192
    want = [(w.dequantise(dtype), w.dequantise(dtype, 3, 10)), (large.dequantise(dtype),)]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # importing it raises ImportError
    monkeypatch.setattr(quant, "CHUNK_ELEMENTS", 5 * 192)
    assert torch.equal(w.dequantise(dtype), want[0][0])
    assert torch.equal(w.dequantise(dtype, 3, 10), want[0][1])
    assert torch.equal(large.dequantise(dtype), want[1][0])
