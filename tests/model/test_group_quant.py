"""Weights of whole numbers in groups: what is stacked and reordered is what is multiplied."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_serve.model import group_quant
from mora_serve.model.group_quant import GroupWeight
from mora_serve.model.quant import DenseWeight, fuse

COLUMNS = 96


def weight(
    rows: int, seed: int, group: int = 32, *, zeros: bool = True, ordered: bool = False
) -> GroupWeight:
    """Any codes, scales and zeros; all ``ordered`` ones are in one order."""
    generator = torch.Generator().manual_seed(seed)
    size = (rows, -(-COLUMNS // group))
    zero = torch.randint(0, 16, size, generator=generator, dtype=torch.uint8)
    return GroupWeight(
        torch.randint(0, 256, (rows, COLUMNS // 2), generator=generator, dtype=torch.uint8),
        torch.rand(size, generator=generator).half().float(),
        zero if zeros else None,
        group,
        torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(7)) if ordered else None,
    )


def by_definition(w: GroupWeight) -> torch.Tensor:
    """Element by element: scale (code - zero), at the input that the order says."""
    rows, columns = w.shape
    out = torch.empty(rows, columns)
    for o in range(rows):
        for j in range(columns):
            byte = int(w.codes[o, j // 2])
            code = byte % 16 if j % 2 else byte // 16
            zero = 8 if w.zeros is None else int(w.zeros[o, j // w.group])
            place = j if w.order is None else int(w.order[j])
            out[o, place] = w.scales[o, j // w.group] * (code - zero)
    return out


@given(
    group=st.sampled_from([8, 32, 40, 64, 96]),
    zeros=st.booleans(),
    ordered=st.booleans(),
    seed=st.integers(0, 99),
    data=st.data(),
)
@settings(deadline=None, max_examples=25)
def test_numbers_are_those_of_the_definition(group, zeros, ordered, seed, data):
    """Any range of rows, and the product; a last group may be short."""
    w = weight(12, seed, group, zeros=zeros, ordered=ordered)
    want = by_definition(w)
    start = data.draw(st.integers(0, 11))
    stop = data.draw(st.integers(start + 1, 12))
    assert torch.equal(w.dequantise(torch.float32, start, stop), want[start:stop])
    assert torch.equal(w.dequantise(torch.bfloat16), want.bfloat16())
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(w.matmul(x), x @ want.T, rtol=1e-5, atol=1e-3)


@given(
    kinds=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=5),
    group=st.sampled_from([32, 64]),
)
@settings(deadline=None, max_examples=25)
def test_neighbours_of_one_order_become_one(kinds, group):
    """With zeros beside ones without; the rows are those of all parts in order."""
    parts = [weight(8, i, group, zeros=z, ordered=o) for i, (z, o) in enumerate(kinds)]
    linear = fuse(parts)
    changes = sum(a != b for (_, a), (_, b) in itertools.pairwise(kinds))
    assert len(linear.parts) == 1 + changes
    whole = torch.cat([p.dequantise(torch.float32) for p in parts])
    assert torch.equal(linear.dequantise(torch.float32), whole)
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(linear.matmul(x), x @ whole.T, rtol=1e-5, atol=1e-3)


def test_a_large_matrix_is_made_a_few_rows_at_a_time(monkeypatch):
    """No more than so many elements in float32; the numbers are the same."""
    w = weight(12, 0, 40, ordered=True)
    want = w.dequantise(torch.bfloat16)
    made = []
    values = GroupWeight._values

    def counted(self, start, stop):
        made.append(stop - start)
        return values(self, start, stop)

    monkeypatch.setattr(GroupWeight, "_values", counted)
    monkeypatch.setattr(group_quant, "CARD_CHUNK_ELEMENTS", 5 * COLUMNS)
    assert torch.equal(w.dequantise(torch.bfloat16), want)
    assert torch.equal(w.dequantise(torch.bfloat16, 1, 11), want[1:11])
    assert made == [5, 5, 2, 5, 5]


def test_others_stay_apart():
    """Groups of another size, another kind."""
    assert len(fuse([weight(8, 0, 32), weight(8, 1, 64)]).parts) == 2
    assert len(fuse([weight(8, 0), DenseWeight(torch.zeros(8, COLUMNS))]).parts) == 2
    assert len(fuse([DenseWeight(torch.zeros(8, COLUMNS)), weight(8, 0)]).parts) == 2


def test_gradients_flow_to_the_inputs():
    """As through the other kinds: an adapter before it may learn."""
    w = weight(8, 0, ordered=True)
    x = torch.randn(3, COLUMNS, requires_grad=True)
    w.matmul(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(
        x.grad, w.dequantise(torch.float32).sum(0).expand(3, -1), rtol=1e-5, atol=1e-3
    )
