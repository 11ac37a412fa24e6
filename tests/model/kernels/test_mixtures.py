"""The table of a step: every row with every adapter of its mixture, once, in tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.model.kernels import mixtures as m
from mora_serve.model.kernels.mixtures import TILE_ROWS, MixtureBuffers, best_tile_rows

SLOTS, WIDEST, ROWS = 9, 4, 200
RANKS = [3 * slot + 1 for slot in range(SLOTS)]
DORA = [slot % 3 == 0 for slot in range(SLOTS)]
CPU = torch.device("cpu")

mixture = st.lists(
    st.tuples(st.integers(0, SLOTS - 1), st.floats(-2, 2, width=32)),
    max_size=WIDEST,
    unique_by=lambda pair: pair[0],
)
steps = st.lists(st.tuples(mixture, st.one_of(st.just(1), st.integers(1, 20))), max_size=10)


def filled(chunks, tile_rows: int) -> MixtureBuffers:
    buffers = MixtureBuffers(ROWS, WIDEST, SLOTS, CPU)
    mixtures, lengths = [mixture for mixture, _ in chunks], [n for _, n in chunks]
    assert buffers.fill(mixtures, lengths, RANKS, DORA, tile_rows) == buffers.tile_rows
    return buffers


def tiles(buffers: MixtureBuffers, number: int, first: int) -> list[tuple[int, int]]:
    """First and count of each tile; a tile of one row is the record itself."""
    count = buffers.table[0, number].item()
    if buffers.tile_rows == m.VECTOR:
        return [(i, 1) for i in range(count)]
    return buffers.table[1 : 1 + count, first : first + 2].tolist()


@given(chunks=steps, tile_rows=st.sampled_from((0, *TILE_ROWS)))
def test_every_row_stands_once_with_each_adapter_of_its_mixture(chunks, tile_rows):
    """Read back by the rows' records, the table is the step: rows, slots, weights, facts, order."""
    buffers = filled(chunks, tile_rows)
    table = buffers.table.numpy()
    rows = [mixture for mixture, length in chunks for _ in range(length)]
    found = {}
    for first, count in tiles(buffers, m.EXPAND_TILES, m.EXPAND_FIRST):
        assert 1 <= count <= buffers.tile_rows
        lists = set()
        for record in table[1 + first : 1 + first + count]:
            parts = record[m.MIXTURE :].reshape(WIDEST, m.PER_ADAPTER)[: record[m.ROW_ADAPTERS]]
            weights = parts[:, 2].copy().view(np.float32).tolist()
            assert [RANKS[s] * 2 + DORA[s] for s in parts[:, 1]] == parts[:, 3].tolist()
            assert record[m.ROW] not in found
            found[record[m.ROW]] = list(zip(parts[:, 1].tolist(), weights, strict=True))
            lists.add(tuple(parts[:, 1].tolist()))
            assert all(table[1 + entry, m.ENTRY_ROW] == record[m.ROW] for entry in parts[:, 0])
        assert len(lists) == 1
    assert found == {row: mixture for row, mixture in enumerate(rows) if mixture}
    assert buffers.entries == sum(map(len, rows))


@given(chunks=steps, tile_rows=st.sampled_from(TILE_ROWS))
def test_tiles_of_entries_have_one_slot_and_leave_out_none(chunks, tile_rows):
    buffers = filled(chunks, tile_rows)
    table = buffers.table.numpy()
    rows = [mixture for mixture, length in chunks for _ in range(length)]
    slot_of = {}
    for record in table[1 : 1 + len([r for r in rows if r])]:
        for part in record[m.MIXTURE :].reshape(WIDEST, -1)[: record[m.ROW_ADAPTERS]]:
            slot_of[part[0]] = part[1]
    covered = []
    for i, (first, count) in enumerate(tiles(buffers, m.SHRINK_TILES, m.SHRINK_FIRST)):
        entries, tile = range(first, first + count), table[1 + i]
        assert len(entries) <= tile_rows
        assert {slot_of[entry] for entry in entries} == {tile[m.SHRINK_SLOT]}
        assert tile[m.SHRINK_RANK] == RANKS[tile[m.SHRINK_SLOT]]
        covered += entries
    assert sorted(covered) == list(range(buffers.entries))
    shrink, expand = buffers.capacity(len(rows), tile_rows)
    assert table[0, m.SHRINK_TILES] <= shrink
    assert table[0, m.EXPAND_TILES] <= expand


def test_the_size_of_tiles_follows_the_rows_an_adapter():
    assert best_tile_rows(0, 0) == m.VECTOR
    assert best_tile_rows(64, 64) == m.VECTOR
    assert best_tile_rows(64, 16) == m.SMALL
    assert best_tile_rows(64, 1) == m.LARGE
    assert best_tile_rows(m.VECTOR_ENTRIES + 1, m.VECTOR_ENTRIES + 1) == m.SMALL


def test_the_table_stays_where_it_is():
    """A captured graph reads it there."""
    buffers = MixtureBuffers(8, WIDEST, SLOTS, CPU)
    place = buffers.table.data_ptr()
    for mixtures in ([((0, 1.0),)] * 8, [()] * 3, []):
        buffers.fill(mixtures, [1] * len(mixtures), RANKS, DORA)
        assert buffers.table.data_ptr() == place


def test_a_step_that_has_no_room_is_refused():
    buffers = MixtureBuffers(4, 2, SLOTS, CPU)
    with pytest.raises(ValueError, match="5 rows"):
        buffers.fill([((0, 1.0),)], [5], RANKS, DORA)
    with pytest.raises(ValueError, match="3 adapters"):
        buffers.fill([((0, 1.0), (1, 1.0), (2, 1.0))], [1], RANKS, DORA)
    many = MixtureBuffers(m.VECTOR_ENTRIES + 1, 1, SLOTS, CPU)
    with pytest.raises(ValueError, match="tiles of one row"):
        many.fill([((0, 1.0),)], [m.VECTOR_ENTRIES + 1], RANKS, DORA, m.VECTOR)
