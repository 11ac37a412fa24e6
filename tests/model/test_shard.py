"""A base cut over ranks: the same numbers, and which bases cannot be cut.

The ranks are threads here, each with its own decoder, and talk by gloo as processes do.
"""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.families import FAMILIES, make_base
from mora_serve.config import BaseConfig
from mora_serve.engine.group import RankGroup
from mora_serve.errors import ConfigError
from mora_serve.model.attention import DenseCausal
from mora_serve.model.loading import load_base
from mora_serve.model.pooling import pool_states
from mora_serve.model.quant import DenseWeight, NF4Weight, quantise
from mora_serve.model.shape import PROJECTIONS, SITES
from mora_serve.model.shard import Shard, cut, spans
from tests.adapters.make import SHAPE

CPU = torch.device("cpu")
LENGTH = 20


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A directory a family."""
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        make_base(family, root / family)
    return root


def by_ranks(path, ranks, work):
    """``work(group)`` on a thread a rank; the results by rank."""
    ended = threading.Barrier(ranks)

    def run(rank):
        group = RankGroup(rank, ranks, CPU, path / f"{ranks}-ranks", 60)
        try:
            return work(group)
        finally:
            ended.wait(60)  # who hangs up first would disturb others that are still connecting

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(run, range(ranks)))


@torch.no_grad()
def logits(base):
    ids = torch.randint(4, 320, (LENGTH,), generator=torch.Generator().manual_seed(5))
    attention = DenseCausal(1, LENGTH, base.shape.sliding_window)
    return base.decoder.logits(base.decoder.hidden(ids, torch.arange(LENGTH), attention))


@pytest.mark.parametrize(
    ("family", "quantization"),
    [(f, q) for f in FAMILIES for q in ("none", "nf4") if (f, q) != ("mistral", "nf4")],
)
def test_two_ranks_compute_what_one_does(bases, tmp_path, family, quantization):
    """Logits, pooled states and the fingerprint; weights are cut, not rounded anew."""
    config = BaseConfig(str(bases / family), "main", quantization, "fp32", "cpu")
    whole = load_base(config)
    want, texts = logits(whole), [[5, 6, 7], [8] * 9]
    states = pool_states(whole.decoder, texts, 1)

    def work(group):
        base = load_base(config, group=group)
        for i, layer in enumerate(base.decoder.layers):
            for site, names in SITES.items():
                full = whole.decoder.layers[i].sites[site].dequantise(torch.float32)
                parts, start = [], 0
                for name in names:
                    rows, columns = base.decoder.shard.part(name)
                    end = start + base.shape.projection(name)[0]
                    parts.append(full[start:end][rows, columns])
                    start = end
                got = layer.sites[site].dequantise(torch.float32)
                assert torch.equal(got, torch.cat(parts))
        return base, logits(base), pool_states(base.decoder, texts, 1), group.calls

    (base, got, pooled, calls), other = by_ranks(tmp_path, 2, work)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(torch.from_numpy(pooled), torch.from_numpy(states))
    assert torch.equal(got, other[1])  # to the last bit, or the ranks would drift apart
    assert calls == other[3] == 2 * base.shape.layers + 1 + 2  # two sums a layer, one join
    assert base.fingerprint == whole.fingerprint
    assert base.shape == whole.shape
    if quantization == "nf4":
        assert any(
            isinstance(p, NF4Weight) for s in base.decoder.layers[0].sites.values() for p in s.parts
        )
        assert base.linear_bytes + other[0].linear_bytes == whole.linear_bytes


def test_three_ranks_share_what_three_does_not_divide(tmp_path):
    """Five blocks of intermediate features, and a vocabulary of 320."""
    sizes = {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 3}
    make_base("llama3", tmp_path, intermediate_size=320, **sizes)
    config = BaseConfig(str(tmp_path), "main", "nf4", "fp32", "cpu")
    want = logits(load_base(config))

    def work(group):
        base = load_base(config, group=group)
        return base.decoder.shape.intermediate_size, logits(base)

    for got, features in zip(by_ranks(tmp_path, 3, work), (128, 128, 64), strict=True):
        assert got[0] == features
        torch.testing.assert_close(got[1], want, rtol=1e-4, atol=2e-4)


def test_a_checkpoint_stored_in_nf4_is_cut_between_its_blocks(tmp_path):
    """The bundled base, whose heads of 32 two ranks can share and four cannot."""
    config = BaseConfig("demo", dtype="fp32", device="cpu")
    whole = load_base(config)
    with pytest.raises(ConfigError, match="inside of NF4's blocks of 64"):
        Shard.of(whole.shape, 0, 4, quantised=True)
    want = logits(whole)
    for got in by_ranks(tmp_path, 2, lambda group: logits(load_base(config, group=group))):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)


@given(st.integers(1, 4000), st.integers(1, 9), st.sampled_from([1, 8, 64]))
def test_spans_cover_all_in_whole_units_that_differ_by_one_at_most(units, ranks, unit):
    parts = spans(units * unit, ranks, unit)
    assert parts[0].start == 0
    assert parts[-1].stop == units * unit
    assert all(a.stop == b.start for a, b in pairwise(parts))
    sizes = [p.stop - p.start for p in parts]
    assert max(sizes) - min(sizes) in (0, unit)
    assert all(size % unit == 0 for size in sizes)


@given(st.data())
def test_the_parts_of_every_projection_are_the_whole(data):
    """Rows or columns; and a rank's local shape is what its parts have."""
    ranks = data.draw(st.sampled_from([1, 2]))
    shards = [Shard.of(SHAPE, r, ranks, quantised=False) for r in range(ranks)]
    for name in PROJECTIONS:
        marks = torch.zeros(SHAPE.projection(name), dtype=torch.int)
        for shard in shards:
            rows, columns = shard.part(name)
            marks[rows, columns] += 1
            assert shard.local.projection(name) == tuple(marks[rows, columns].shape)
        assert (marks == 1).all()
    assert sum(s.vocabulary.stop - s.vocabulary.start for s in shards) == SHAPE.vocab_size


@given(st.data())
def test_a_part_of_an_nf4_weight_is_the_part_quantised_alone(data):
    """Bit for bit, codes and scales: no block is ever divided."""
    rows, blocks = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 4))
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weight = torch.randn(rows, 64 * blocks, generator=seed)
    top = data.draw(st.integers(0, rows - 1))
    left = data.draw(st.integers(0, blocks - 1))
    part = slice(top, rows), slice(64 * left, 64 * blocks)
    got, want = cut(quantise(weight), part), quantise(weight[part])
    assert isinstance(got, NF4Weight)
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.absmax, want.absmax)


def test_a_cut_through_a_block_and_a_weight_of_another_kind_are_refused():
    with pytest.raises(ConfigError, match="blocks of 64 columns"):
        cut(quantise(torch.randn(32, 128)), (slice(0, 32), slice(0, 96)))
    with pytest.raises(ConfigError, match="cannot be cut"):
        cut(object(), (slice(0, 1), slice(0, 1)))
    assert cut(DenseWeight(torch.ones(4, 4)), (slice(0, 1), slice(1, 4))).shape == (1, 3)


@pytest.mark.parametrize(
    ("family", "quantization", "ranks", "message"),
    [
        ("llama3", "none", 4, "4 ranks cannot share 2 key/value heads evenly; .* takes 1, 2"),
        ("llama2", "none", 3, "3 ranks cannot share 4 key/value heads evenly; .* takes 1, 2, 4"),
        ("mistral", "nf4", 2, "o_proj's rows of 64 inside of NF4's blocks of 64"),
        ("llama2", "none", 4, "4 ranks cannot share 192 intermediate features in parts of 64"),
    ],
)
def test_a_base_that_so_many_ranks_cannot_share_is_refused(
    bases, family, quantization, ranks, message
):
    """With the field, the numbers and the way out; before anything is loaded."""

    class Alone:
        rank, size, device = 0, ranks, CPU

    with pytest.raises(ConfigError, match=message) as caught:
        load_base(
            BaseConfig(str(bases / family), "main", quantization, "fp32", "cpu"), group=Alone()
        )
    assert caught.value.field == "engine.tensor_parallel"


def test_a_weight_of_another_size_than_configured_is_told_for_a_part_as_well(bases, tmp_path):
    """Although the part that is read of it would have the right size."""
    make_base("llama2", tmp_path)
    config = tmp_path / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "intermediate_size": 128}))

    def work(group):
        with pytest.raises(ConfigError, match="configuration says"):
            load_base(BaseConfig(str(tmp_path), "main", "none", "fp32", "cpu"), group=group)

    by_ranks(tmp_path, 2, work)


def test_a_rank_that_does_not_come_is_told_in_time(tmp_path):
    """Whoever waits for it gets an error, not nothing."""
    from mora_serve.engine.failures import DeviceLost

    left = threading.Event()

    def work(group):
        if group.rank == 1:
            left.wait(60)
            return
        with pytest.raises(DeviceLost, match="does not answer"):
            group.sum(torch.ones(3))
        left.set()
        return

    group = lambda rank: RankGroup(rank, 2, CPU, tmp_path / "ranks", 2)  # noqa: E731
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda rank: work(group(rank)), range(2)))
