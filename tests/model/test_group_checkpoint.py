"""GPTQ and AWQ bases: the numbers of the formats' definitions, and what is not taken is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.families import make_base
from benchmarks.group_checkpoints import Recipe, oracle, stored_weights, write
from mora_serve.config import BaseConfig
from mora_serve.errors import ConfigError
from mora_serve.model.attention import DenseCausal
from mora_serve.model.group_quant import GroupWeight
from mora_serve.model.loading import Base, load_base
from mora_serve.model.quant import DenseWeight
from mora_serve.model.shape import SITES, projection_path

IDS = torch.randint(2, 320, (40,), generator=torch.Generator().manual_seed(0))
RECIPES = {
    "symmetric": Recipe(),
    "halves of blocks": Recipe(group=32),
    "a last group that is short": Recipe(group=128),
    "one group": Recipe(group=-1),
    "zeros": Recipe(symmetric=False),
    "zeros as they are": Recipe(symmetric=False, v2=True, group=32),
    "act-order": Recipe(symmetric=False, act_order=True, group=32),
    "act-order, head": Recipe(act_order=True, head=True),
    "8 bits": Recipe(bits=8, symmetric=False, act_order=True),
    "awq": Recipe("awq"),
    "awq, folded": Recipe("awq", fold=True, group=32, head=True),
}


def load(directory: Path, quantization: Any = "auto", dtype: Any = "fp32") -> Base:
    return load_base(BaseConfig(str(directory), "main", quantization, dtype, "cpu"))


def edit(directory: Path, **changes: Any) -> None:
    """Set keys of quantization_config; None removes one."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    stored = {**config["quantization_config"], **changes}
    config["quantization_config"] = {k: v for k, v in stored.items() if v is not None}
    file.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain base that no test changes."""
    directory = tmp_path_factory.mktemp("plain")
    make_base("llama2", directory)
    return directory


@pytest.fixture(scope="module")
def gptq(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(root, tmp_path_factory.mktemp("gptq"), RECIPES["act-order"])


@pytest.fixture(scope="module")
def halves(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base in bfloat16, as models are published; its copies' other tensors are in float16."""
    directory = shutil.copytree(root, tmp_path_factory.mktemp("halves") / "base")
    tensors = load_file(directory / "model.safetensors")
    tensors = {k: v.bfloat16().float() for k, v in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture
def copy(gptq: Path, tmp_path: Path) -> Path:
    """A checkpoint to change."""
    return shutil.copytree(gptq, tmp_path / "copy")


@pytest.mark.parametrize("name", RECIPES)
def test_weights_and_logits_are_those_of_the_definition(
    root: Path, tmp_path: Path, name: str
) -> None:
    """Weights to the last bit; logits as transformers computes them with these weights."""
    recipe = RECIPES[name]
    base = load(write(root, tmp_path, recipe))
    assert base.quantization == f"{recipe.method}-int{recipe.bits}"
    want = stored_weights(tmp_path)
    for i, layer in enumerate(base.decoder.layers):
        for site, projections in SITES.items():
            whole = torch.cat([want[f"{projection_path(i, p)}.weight"] for p in projections])
            assert torch.equal(layer.sites[site].dequantise(torch.float32), whole)
            assert torch.equal(layer.sites[site].dequantise(torch.float32, 3, 40), whole[3:40])
            kind = DenseWeight if recipe.bits == 8 else GroupWeight
            assert [type(p) for p in layer.sites[site].parts] == [kind]
    assert isinstance(base.decoder.head, GroupWeight) == recipe.head
    reference = oracle(tmp_path, lambda: make_base("llama2", tmp_path / "again"))
    with torch.no_grad():
        hidden = base.decoder.hidden(IDS, torch.arange(len(IDS)), DenseCausal(1, len(IDS)))
        got = base.decoder.logits(hidden)
        expected = reference(input_ids=IDS[None]).logits[0]
    assert (got - expected).norm() / expected.norm() < 1e-5


def test_nothing_is_read_from_the_file_afterwards(copy: Path) -> None:
    """It may change: the weights stay."""
    base = load(copy)
    site = base.decoder.layers[0].sites["qkv"]
    before = site.dequantise(torch.float32)
    file = copy / "model.safetensors"
    with file.open("r+b") as f:
        f.write(b"\xff" * file.stat().st_size)
    assert torch.equal(site.dequantise(torch.float32), before)


def test_four_bits_take_the_memory_of_four_bits(root: Path, tmp_path: Path) -> None:
    """4.5 bits a weight in groups of 64, 4.625 with zeros."""
    for recipe, bits in ((RECIPES["symmetric"], 4.5), (RECIPES["zeros"], 4.625)):
        base = load(write(root, tmp_path / str(bits), recipe))
        assert base.linear_bytes == bits / 8 * base.shape.linear_parameters


def test_modules_that_were_left_out_stay_as_they_are(root: Path, gptq: Path, copy: Path) -> None:
    """modules_to_not_convert and the like: the layer has a weight, and no qweight."""
    tensors = load_file(copy / "model.safetensors")
    plain = load_file(root / "model.safetensors")
    path = "model.layers.0.self_attn.k_proj"
    for key in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{path}.{key}"]
    tensors[f"{path}.weight"] = plain[f"{path}.weight"]
    save_file(tensors, copy / "model.safetensors")
    parts = load(copy).decoder.layers[0].sites["qkv"].parts
    assert [type(p) for p in parts] == [GroupWeight, DenseWeight, GroupWeight]
    assert torch.equal(parts[1].dequantise(torch.float32), plain[f"{path}.weight"])


def test_biases_of_zeros_are_no_biases(copy: Path) -> None:
    """AutoGPTQ writes them for layers that have none; others would be left out in silence."""
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.bias"] = torch.zeros(192, dtype=torch.float16)
    save_file(tensors, copy / "model.safetensors")
    assert load(copy).decoder.layers[1].sites["gate_up"].bias is None
    tensors["model.layers.1.mlp.up_proj.bias"][7] = 0.5
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ConfigError, match=r"up_proj\.bias"):
        load(copy)


class TestRefused:
    """By name, with the value and a remedy."""

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"bits": 3}, "bits '3'; 4 or 8 is supported"),
            ({"bits": "4"}, "bits '4'"),
            ({"group_size": 0}, "group_size '0'; -1 or a multiple of 8"),
            ({"group_size": 100}, "group_size '100'"),
            ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'; 'gptq' or 'gptq_v2'"),
            ({"checkpoint_format": None, "format": "bitblas"}, "format 'bitblas'"),
            ({"is_marlin_format": True}, "is_marlin_format 'True'"),
            ({"pack_dtype": "int16"}, "pack_dtype 'int16'"),
            ({"dynamic": {"-:.*down.*": {}}}, "dynamic .*; one setting for all modules"),
            ({"quant_method": "awq", "version": "gemv"}, "version 'gemv'; 'gemm'"),
            ({"quant_method": "awq", "bits": 8}, "bits '8'; 4 is supported"),
            ({"quant_method": "awq", "zero_point": False}, "zero_point 'False'; true"),
            ({"quant_method": "compressed-tensors"}, "stored as 'compressed-tensors'"),
            ({"quant_method": "fp8"}, "stored as 'fp8'"),
            ({"quant_method": None}, "stored as 'None'"),
        ],
    )
    def test_formats_that_are_not_taken(
        self, copy: Path, changes: dict[str, Any], message: str
    ) -> None:
        edit(copy, **changes)
        with pytest.raises(ConfigError, match=rf"^base\.model: .*{message}") as e:
            load(copy)
        assert e.value.field == "base.model"
        assert str(copy) not in e.value.message

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("qweight", torch.zeros(16, 128), "is torch.float32"),
            ("qweight", torch.zeros(16, dtype=torch.int32), "not a table"),
            (
                "qweight",
                torch.zeros(8, 128, dtype=torch.int32),
                r"is \[2, 128\].* \[4, 16\]|qzeros",
            ),
            ("qweight", torch.zeros(16, 64, dtype=torch.int32), "qzeros"),
            ("qzeros", torch.zeros(4, 8, dtype=torch.int32), r"qzeros is \[4, 8\].*\[4, 16\]"),
            ("qzeros", torch.zeros(4, 16), "qzeros is torch.float32"),
            ("qzeros", None, "qzeros is missing"),
            ("scales", torch.zeros(3, 128), r"scales is \[3, 128\].*\[4, 128\]"),
            ("scales", torch.zeros(4, 128, dtype=torch.int32), "something else than finite"),
            ("scales", torch.full((4, 128), float("nan")), "something else than finite"),
            ("g_idx", torch.full((128,), 4, dtype=torch.int32), "g_idx does not put 32 inputs"),
            ("g_idx", torch.full((128,), -1, dtype=torch.int32), "g_idx does not put 32 inputs"),
            ("g_idx", torch.zeros(128, dtype=torch.int32), "check that group_size is right"),
            ("g_idx", torch.zeros(64, dtype=torch.int32), r"g_idx is \[64\]"),
            ("g_idx", None, "g_idx is missing"),
        ],
    )
    def test_tensors_that_do_not_say_what_they_should(
        self, copy: Path, key: str, value: torch.Tensor | None, message: str
    ) -> None:
        tensors = load_file(copy / "model.safetensors")
        name = f"model.layers.1.self_attn.o_proj.{key}"
        del tensors[name]
        if value is not None:
            tensors[name] = value
        save_file(tensors, copy / "model.safetensors")
        with pytest.raises(ConfigError, match=rf"^base\.model: .*({message})") as e:
            load(copy)
        assert "o_proj" in e.value.message

    def test_layers_of_another_size(self, copy: Path) -> None:
        file = copy / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "intermediate_size": 256}))
        with pytest.raises(ConfigError, match=r"gate_proj is \[192, 128\], .* says \[256, 128\]"):
            load(copy)

    def test_a_checkpoint_that_does_not_say_how_it_is_stored(self, copy: Path) -> None:
        """Old tools wrote it into a file of its own."""
        file = copy / "config.json"
        config = json.loads(file.read_text())
        del config["quantization_config"]
        file.write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=r"q_proj is stored in groups.*quantize_config\.json"):
            load(copy)

    def test_a_quantised_head_of_a_model_that_has_none(self, root: Path, tmp_path: Path) -> None:
        write(root, tmp_path, RECIPES["act-order, head"])
        file = tmp_path / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "tie_word_embeddings": True}))
        with pytest.raises(ConfigError, match=r"lm_head\.qweight"):
            load(tmp_path)

    def test_another_quantisation_on_top(self, gptq: Path) -> None:
        """Neither NF4 of it nor unquantised weights can be had; auto, the default, takes it."""
        for wanted, message in (("nf4", "but the checkpoint is gptq-int4"), ("none", "4-bit")):
            with pytest.raises(ConfigError, match=message) as e:
                load(gptq, wanted)
            assert e.value.field == "base.quantization"
            assert "use 'auto'" in e.value.message


class TestFingerprint:
    """Adapters fit a quantised copy of their base, unless it has other inputs."""

    def test_of_a_copy_is_the_base_s(self, halves: Path, tmp_path: Path) -> None:
        """Numbers too small for float16's full precision among them, as published models have."""
        tensors = load_file(halves / "model.safetensors").values()
        assert any((t.half().float() != t).any() for t in tensors)
        wanted = load(halves).fingerprint
        for name in ("act-order", "awq"):
            assert load(write(halves, tmp_path / name, RECIPES[name])).fingerprint == wanted

    def test_of_a_copy_with_scaled_inputs_is_another(self, halves: Path, tmp_path: Path) -> None:
        """AWQ scales norms and weights: an adapter of the plain base would see other inputs."""
        wanted = load(halves).fingerprint
        assert load(write(halves, tmp_path, RECIPES["awq, folded"])).fingerprint != wanted
