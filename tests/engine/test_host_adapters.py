"""Adapters on the host: exact tensors, few bytes, the least recently used go first."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from mora_serve.engine import host_adapters
from mora_serve.engine.host_adapters import HostAdapters
from mora_serve.model.int8_slots import Int8Slots, quantise_rows
from mora_serve.model.lora import AdapterSlots
from mora_serve.model.native.library import library
from mora_serve.model.shape import projection_path


def host(local, limit=1 << 20, dtype=torch.float32):
    decoder = local.base.decoder
    slots = AdapterSlots(decoder.shape, 1, 8, dtype, torch.device("cpu"))
    return HostAdapters(decoder, slots, local._open, limit)


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch):
    """Both ways to read a file."""
    if request.param == "torch":
        monkeypatch.setattr(host_adapters, "library", lambda: None)
    elif library() is None:
        pytest.skip("the native path was not built: no C compiler")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("slots", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_stored_dtype_is_read_exactly(make_engine, model_root, tmp_path, dtype, slots):
    """A bit for bit, B transposed and scaled in float32, rounded once, wherever in the file."""
    source = model_root / "adapters" / "rank-4"
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "adapter_config.json").write_bytes(
        (source / "adapter_config.json").read_bytes()
    )
    tensors = {k: v.to(dtype) for k, v in load_file(source / "adapter_model.safetensors").items()}
    for tensor in tensors.values():  # the least and greatest numbers, halves of the last bit
        edges = [0.0, -0.0, 6e-8, -6.1e-5, 65504.0, 1.00390625, 1.01171875]
        tensor.view(-1)[: len(edges)] = torch.tensor(edges).to(dtype)
    file = tmp_path / "x" / "adapter_model.safetensors"
    save_file(tensors, file)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for spaces in (0, 1):  # after the header: with one of them no tensor is aligned
        header = (length + spaces).to_bytes(8, "little") + data[8 : 8 + length] + b" " * spaces
        file.write_bytes(header + data[8 + length :])
        local = make_engine(names=())
        local.register("x", tmp_path, "x")
        adapter = local.adapters[local.digests["x"]]
        found = host(local, dtype=slots).get(adapter.digest)
        assert len(found.modules) == len(adapter.modules)
        for module, stored in zip(found.modules, adapter.modules, strict=True):
            prefix = f"base_model.model.{projection_path(module.layer, module.projection)}"
            a, b = module.rows
            assert torch.equal(a, tensors[f"{prefix}.lora_A.weight"].to(slots))
            wanted = tensors[f"{prefix}.lora_B.weight"].float().T * stored.scaling
            assert torch.equal(b, wanted.to(slots))
            assert module.dora is None


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ["rslora", "patterns"])
def test_int8_rows_are_of_the_file_s_numbers_scaled_in_float32(make_engine, model_root, name):
    """Whatever the base's type: no rounding to it comes between."""
    local = make_engine(names=(name,))
    decoder, digest = local.base.decoder, local.digests[name]
    slots = Int8Slots(decoder.shape, 1, 16, torch.bfloat16, torch.device("cpu"))
    found = HostAdapters(decoder, slots, local._open, 1 << 20).get(digest)
    tensors = load_file(model_root / "adapters" / name / "adapter_model.safetensors")
    for module, stored in zip(found.modules, local.adapters[digest].modules, strict=True):
        prefix = f"base_model.model.{projection_path(module.layer, module.projection)}"
        a, b, scale = module.rows
        want_a, scale_a = quantise_rows(tensors[f"{prefix}.lora_A.weight"])
        want_b, scale_b = quantise_rows(tensors[f"{prefix}.lora_B.weight"].T * stored.scaling)
        assert torch.equal(a, want_a)
        assert torch.equal(b, want_b)
        assert torch.equal(scale, scale_a * scale_b)
    assert found.nbytes == sum(t.nbytes for module in found.modules for t in module.rows)


def test_the_least_recently_used_adapter_goes_first_and_the_bytes_hold(make_engine):
    local = make_engine()
    digests = [local.digests[n] for n in ("rank-1", "rank-2", "rank-4")]
    sizes = [host(local).get(d).nbytes for d in digests]
    kept = host(local, limit=sizes[0] + sizes[2])
    for digest in (*digests[:2], digests[0], digests[2]):
        kept.get(digest)
    assert [d in kept for d in digests] == [True, False, True]
    assert kept.nbytes == sizes[0] + sizes[2]


def test_what_is_larger_than_the_limit_is_given_but_not_kept(make_engine):
    local = make_engine()
    digest = local.digests["rank-8"]
    kept = host(local, limit=100)
    assert kept.get(digest).rank == 8
    assert digest not in kept
    assert kept.nbytes == 0
