"""Residency: references, LRU, pins, and what a slot holds."""

from __future__ import annotations

import time

import pytest
import torch
from safetensors.torch import load_file

from mora_serve.engine import host_adapters
from mora_serve.engine.adapter_pool import GRACE_POLLS, SlotWriter
from mora_serve.engine.host_adapters import HostAdapter, HostModule
from mora_serve.engine.kv_cache import IntegrityError
from mora_serve.errors import ResourceExhausted
from mora_serve.model.lora import AdapterSlots
from mora_serve.model.shape import PROJECTIONS, ModelShape, projection_path

HOLDS_SLOTS = True


def hold(local, *names):
    """Hold adapters, waiting for their loads."""
    digests = tuple(local.digests[n] for n in names)
    for _ in range(2000):
        if local.engine.pool.hold(digests):
            return digests
        time.sleep(0.002)
        local.engine.pool.poll()
    raise TimeoutError(names)


def test_the_least_recently_used_adapter_makes_room(make_engine):
    """With all slots taken the one unused the longest goes; one in use never does."""
    local = make_engine(slots=4)
    pool = local.engine.pool
    held = hold(local, "rank-1")
    for name in ("rank-2", "rank-4", "rank-8"):
        pool.drop(hold(local, name))
    pool.drop(hold(local, "rank-2"))
    pool.drop(hold(local, "rank-16"))
    assert set(pool.resident) == {
        local.digests[n] for n in ("rank-1", "rank-8", "rank-2", "rank-16")
    }
    assert pool.evictions == 1
    with pytest.raises(IntegrityError, match="held"):
        pool.check_integrity()
    pool.drop(held)
    pool.check_integrity()


def test_nothing_is_held_when_no_slot_is_free(make_engine):
    """A mixture that does not fit beside those in use waits and holds nothing."""
    local = make_engine(slots=4)
    pool = local.engine.pool
    held = hold(local, "rank-1", "rank-2", "rank-4")
    wanted = tuple(local.digests[n] for n in ("rank-8", "rank-16"))
    for _ in range(50):
        assert not pool.hold(wanted)
        assert not pool.assigned(wanted)
        time.sleep(0.002)
        pool.poll()
    assert pool.misses == 4  # one of the two has a slot, and keeps it from the other
    pool.drop(held)
    pool.drop(hold(local, "rank-8", "rank-16"))
    pool.check_integrity()


def test_what_is_resident_of_a_mixture_stays_while_the_rest_loads(make_engine):
    """The adapter of a mixture that is next to go makes no room for the others."""
    local = make_engine(slots=4)
    pool = local.engine.pool
    for name in ("rank-1", "rank-2", "rank-4", "rank-8"):
        pool.drop(hold(local, name))
    pool.drop(hold(local, "rank-16", "rank-1"))
    assert pool.misses == 5
    assert local.digests["rank-2"] not in pool.resident


def test_an_adapter_just_loaded_is_left_to_who_asked_for_it(make_engine):
    """A fresh adapter is evicted only after its grace period."""
    local = make_engine(slots=4)
    pool = local.engine.pool
    fresh = [local.digests[n] for n in ("rank-1", "rank-2", "rank-4", "rank-8")]
    for digest in fresh:
        pool.hold((digest,))
    while pool._done.qsize() < 4:  # no polls meanwhile: they are the period
        time.sleep(0.002)
    pool.poll()
    other = (local.digests["rank-16"],)
    assert not pool.hold(other)
    assert not pool.assigned(other)
    for _ in range(GRACE_POLLS):
        pool.poll()
    pool.hold(other)
    assert pool.assigned(other)


def test_pinned_adapters_load_by_themselves_and_stay(make_engine):
    """A pin loads the adapter and keeps it; too many pins are refused with the remedy."""
    local = make_engine(slots=5)
    pool = local.engine.pool
    pool.pin(local.digests["rank-1"])
    while local.digests["rank-1"] not in pool.resident:
        pool.poll()
        time.sleep(0.002)
    with pytest.raises(ResourceExhausted, match=r"pinned.*adapters\.slots"):
        pool.pin(local.digests["rank-2"])
    others = ("rank-2", "rank-4", "rank-8", "rank-16", "rank-32", "rank-64")
    for name in others:
        pool.drop(hold(local, name))
    assert local.digests["rank-1"] in pool.resident
    assert pool.misses == 1 + len(others)
    pool.unpin(local.digests["rank-1"])
    for _ in range(GRACE_POLLS):
        pool.poll()
    pool.drop(hold(local, "rank-2"))
    assert local.digests["rank-1"] not in pool.resident


def test_a_pinned_adapter_that_cannot_be_loaded_is_tried_once(make_engine):
    """Until it is pinned again."""
    local = make_engine()
    pool, digest = local.engine.pool, local.digests["rank-1"]
    adapter = local.adapters.pop(digest)
    loads = []
    pool.pin(digest)
    while not loads:
        time.sleep(0.002)
        loads += pool.poll()
    assert loads[0].error.code == "NOT_FOUND"
    for _ in range(3):
        pool.poll()
    assert pool.misses == 1
    local.adapters[digest] = adapter
    pool.pin(digest)
    while digest not in pool.resident:
        pool.poll()
    assert pool.misses == 2


def test_a_reused_slot_keeps_nothing_of_the_adapter_before(make_engine):
    """After a large adapter, a small one in the same slot leaves zeros everywhere else."""
    local = make_engine(slots=4)
    pool = local.engine.pool
    for name in ("rank-64", "dora", "rank-32", "rslora", "attention"):
        digests = hold(local, name)
        pool.drop(digests)
    slot = pool.slot(local.digests["attention"])
    adapter = local.adapters[local.digests["attention"]]
    targets = {(m.layer, m.projection) for m in adapter.modules}
    for layer in range(local.base.shape.layers):
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"):
            part = pool.slots.projection(layer, projection)
            used = adapter.rank if (layer, projection) in targets else 0
            assert part.a[slot, used:].abs().max() == 0
            assert part.b[slot, used:].abs().max() == 0
    assert not pool.slots.has_dora[slot]  # what is left of scales is not read


def test_a_dora_adapter_of_few_projections_finds_no_scales_of_another():
    """Not even of one that was in the slot before the last."""
    shape = ModelShape("llama", 32, 16, 24, 1, 4, 2, 4, 64, 1e-6)
    slots = AdapterSlots(shape, 2, 4, torch.float32, torch.device("cpu"))
    writer = SlotWriter(slots)

    def adapter(dora: bool, *projections: str) -> HostAdapter:
        modules = tuple(
            HostModule(
                0,
                p,
                (torch.ones(2, columns), torch.ones(2, rows)),
                torch.ones(rows) if dora else None,
            )
            for p in projections
            for rows, columns in [shape.projection(p)]
        )
        return HostAdapter(2, dora, 0, modules)

    for each in (adapter(True, *PROJECTIONS), adapter(False, "q_proj"), adapter(True, "q_proj")):
        writer.fill(1, each)
    scaled = {p for p in PROJECTIONS if slots.projection(0, p).dora[1].any()}
    assert scaled == {"q_proj"}
    assert slots.has_dora == [False, True]


def test_a_dora_slot_holds_what_the_norms_say(make_engine, model_root):
    """c - 1 with c = m / ||W + s B A|| per output row, from the files of base and adapter."""
    local = make_engine(names=("dora",))
    pool = local.engine.pool
    hold(local, "dora")
    slot = pool.slot(local.digests["dora"])
    base = load_file(model_root / "base" / "model.safetensors")
    stored = load_file(model_root / "adapters" / "dora" / "adapter_model.safetensors")
    modules = local.adapters[local.digests["dora"]].modules
    for module in modules:
        path = projection_path(module.layer, module.projection)
        prefix = f"base_model.model.{path}"
        a, b = stored[f"{prefix}.lora_A.weight"], stored[f"{prefix}.lora_B.weight"]
        merged = base[f"{path}.weight"] + module.scaling * b @ a
        want = stored[f"{prefix}.lora_magnitude_vector"] / merged.norm(dim=1) - 1
        held = pool.slots.projection(module.layer, module.projection).dora
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(held[slot], want, rtol=1e-4, atol=1e-6)
    pool.drop((local.digests["dora"],))


def test_dora_scales_are_made_once(make_engine, monkeypatch):
    """A DoRA adapter that comes back to the device needs no pass over the base."""
    local = make_engine(slots=4)
    made = []
    norm = host_adapters.dora_norm
    monkeypatch.setattr(host_adapters, "dora_norm", lambda *a: made.append(1) or norm(*a))
    pool = local.engine.pool
    first = hold(local, "dora")
    scales = [p.dora[pool.slot(*first)].clone() for p in pool.slots.parts()]
    pool.drop(first)
    count = len(made)
    for name in ("rank-1", "rank-2", "rank-4", "rank-8"):
        pool.drop(hold(local, name))
    assert first[0] not in pool.resident
    again = hold(local, "dora")
    assert count == len(made) > 0
    kept = [p.dora[pool.slot(*again)] for p in pool.slots.parts()]
    assert all(map(torch.equal, scales, kept))


def slot_contents(pool, digest):
    """Copies of all that an adapter's slot holds."""
    slot = pool.slot(digest)
    return [t[slot].clone() for p in pool.slots.parts() for t in (p.a, p.b)]


def test_an_adapter_that_comes_back_is_not_read_again(make_engine):
    """Its tensors were kept on the host; without room for them it is opened at each load."""
    names = ("rank-1", "rank-2", "rank-4", "rank-8", "rank-16")
    for host_bytes, opened in ((1 << 20, 5), (0, 6)):
        local = make_engine(slots=4, host_bytes=host_bytes)
        pool = local.engine.pool
        opens = []
        local.open_hook = opens.append
        first = hold(local, "rank-1")
        before = slot_contents(pool, *first)
        pool.drop(first)
        for name in names[1:]:
            pool.drop(hold(local, name))
        assert first[0] not in pool.resident
        again = hold(local, "rank-1")
        assert len(opens) == opened
        assert all(map(torch.equal, slot_contents(pool, *again), before))


def prefetched(local, *line):
    """Prefetch until all that can be has been done, as the engine does step by step."""
    line = [tuple(local.digests[n] for n in names) for names in line]
    for _ in range(2000):
        if local.engine.pool.prefetch(line):
            return
        time.sleep(0.002)
        local.engine.pool.poll()
    raise TimeoutError(line)


def settle(local):
    """Wait for the loads under way."""
    for _ in range(GRACE_POLLS + 1000):
        local.engine.pool.poll()
        if not local.engine.pool.loading:
            return
        time.sleep(0.002)


def test_adapters_of_the_next_in_line_are_loaded_ahead(make_engine):
    """Into slots that nobody needs; they are there when their turn comes."""
    local = make_engine(slots=4)
    pool = local.engine.pool
    held = hold(local, "rank-1")
    pool.drop(hold(local, "rank-2"))
    prefetched(local, ("rank-4", "rank-8"), ("rank-16",))
    settle(local)
    wanted = {local.digests[n] for n in ("rank-4", "rank-8", "rank-16")}
    assert set(pool.resident) == wanted | set(held)
    misses = pool.misses
    assert pool.hold((local.digests["rank-16"],))
    assert pool.misses == misses


def test_what_is_loaded_ahead_robs_nobody(make_engine):
    """Neither those in use nor those that others in line need make room for it."""
    local = make_engine(slots=4)
    pool = local.engine.pool
    hold(local, "rank-1", "rank-2")
    for name in ("rank-4", "rank-8"):
        pool.drop(hold(local, name))
    before = set(pool.resident)
    prefetched(local, ("rank-16",), ("rank-4",), ("rank-8",))
    settle(local)
    assert set(pool.resident) == before
    assert pool.evictions == 0


def test_behind_a_request_without_room_nobody_takes_any(make_engine):
    """Two adapters are needed and one slot is left: the next in line does not get it."""
    local = make_engine(slots=4)
    pool = local.engine.pool
    hold(local, "rank-1", "rank-2", "rank-4")
    prefetched(local, ("rank-8", "rank-16"), ("rank-32",))
    settle(local)
    pool.drop((local.digests["rank-1"],))
    assert local.digests["rank-8"] in pool.resident
    assert not pool.assigned((local.digests["rank-32"],))


def test_without_a_slot_an_adapter_is_made_ready_on_the_host(make_engine):
    """Its file is read while the slots are in use: the load itself is a copy."""
    local = make_engine(slots=4)
    pool = local.engine.pool
    held = hold(local, "rank-1", "rank-2", "rank-4", "rank-8")
    opens = []
    local.open_hook = opens.append
    prefetched(local, ("rank-16",), ("rank-32",))
    settle(local)
    assert opens == [local.digests["rank-16"], local.digests["rank-32"]]
    assert set(pool.resident) == set(held)
    pool.drop(held[:1])
    hold(local, "rank-16")
    assert len(opens) == 2


@pytest.mark.parametrize("host_bytes", [0, 40_000])
def test_what_the_host_does_not_hold_is_converted_once(make_engine, host_bytes):
    """Where those of the line drive each other out, they would do so for ever."""
    local = make_engine(slots=4, host_bytes=host_bytes)
    hold(local, "rank-1", "rank-2", "rank-4", "rank-8")
    opens = []
    local.open_hook = opens.append
    line = ("rank-16",), ("rank-32",), ("rank-64",)
    for _ in range(3):
        prefetched(local, *line)
        settle(local)
    assert sorted(opens) == sorted(local.digests[name] for (name,) in line)
    prefetched(local, ("rank-32",))
    prefetched(local, *line)  # it is in line anew
    settle(local)
    assert opens.count(local.digests["rank-16"]) == 2


def test_what_cannot_be_read_ahead_fails_when_it_is_loaded(make_engine):
    """The request that needs it gets the error, nobody before."""
    local = make_engine(slots=4)
    pool = local.engine.pool
    held = hold(local, "rank-1", "rank-2", "rank-4", "rank-8")
    adapter = local.adapters.pop(local.digests["rank-16"])
    line = [(adapter.digest,)]
    while not pool.prefetch(line):
        pool.poll()
    settle(local)
    assert not pool.assigned(line[0])
    pool.drop(held)
    assert not pool.hold(line[0])
    ended = []
    while not ended:
        ended = pool.poll()
        time.sleep(0.002)
    assert ended[0].error.code == "NOT_FOUND"
