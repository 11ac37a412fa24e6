"""Loading a base: what transformers saves is what is served, and what is not is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.families import make_base
from mora_serve.config import BaseConfig
from mora_serve.errors import ConfigError
from mora_serve.model.attention import DenseCausal
from mora_serve.model.loading import Base, load_base
from mora_serve.model.quant import DenseWeight, NF4Weight

IDS = torch.randint(2, 320, (40,), generator=torch.Generator().manual_seed(0))


def load(directory: Path, quantization: Any = "none", dtype: Any = "fp32") -> Base:
    return load_base(BaseConfig(str(directory), "main", quantization, dtype, "cpu"))


def logits(base: Base) -> torch.Tensor:
    with torch.no_grad():
        hidden = base.decoder.hidden(IDS, torch.arange(len(IDS)), DenseCausal(1, len(IDS)))
        return base.decoder.logits(hidden)


def assert_equal(base: Base, reference: Any) -> None:
    with torch.no_grad():
        want = reference(input_ids=IDS[None]).logits[0]
    assert (logits(base) - want).norm() / want.norm() < 1e-4


def edit(directory: Path, name: str = "config.json", **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    file = directory / name
    values = {**json.loads(file.read_text()), **changes} if file.exists() else changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A plain fp32 base that no test changes, with transformers' model of it."""
    directory = tmp_path_factory.mktemp("plain")
    return directory, make_base("llama2", directory)


@pytest.fixture
def copy(plain, tmp_path):
    """A base to change."""
    return shutil.copytree(plain[0], tmp_path / "base")


@pytest.mark.parametrize(
    ("double", "storage"), [(False, "uint8"), (True, "uint8"), (True, "bfloat16")]
)
def test_bitsandbytes_checkpoints_are_served_as_they_are(plain, tmp_path, double, storage):
    """Nested or not, and under whatever type: logits equal transformers' of the same file.

    The file may change afterwards: nothing of the model is read from it any more.
    """
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=storage,
    )
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        plain[0], quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(plain[0] / name, tmp_path / name)
    reference.save_pretrained(tmp_path)
    for module in reference.modules():  # where it is on, bitsandbytes computes in bfloat16
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    base = load(tmp_path, "nf4")
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as f:
        f.write(b"\xff" * file.stat().st_size)
    assert_equal(base, reference)
    parts = [p for layer in base.decoder.layers for s in layer.sites.values() for p in s.parts]
    assert all(isinstance(p, NF4Weight) for p in parts)


def test_unquantised_weights_of_a_4bit_checkpoint_are_refused(copy):
    """quantization=none cannot be had from a 4-bit file, and other formats not at all."""
    edit(copy, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ConfigError, match="already 4-bit") as e:
        load(copy)
    assert e.value.field == "base.quantization"
    edit(copy, quantization_config={"quant_method": "aqlm"})
    with pytest.raises(ConfigError, match="stored as 'aqlm'"):
        load(copy)
    edit(copy, quantization_config=["gptq"])
    with pytest.raises(ConfigError, match="stored as 'None'"):
        load(copy)


def test_shards_are_read_by_their_index(plain, tmp_path):
    """Of each file that the index names, the tensors it says; files it does not name, none."""
    directory, reference = plain
    reference.save_pretrained(tmp_path, max_shard_size="200KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / name, tmp_path / name)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    save_file({"model.norm.weight": torch.zeros(128)}, tmp_path / "another.safetensors")
    assert_equal(load(tmp_path), reference)
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(ConfigError, match="missing or broken"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match="weight_map"):
        load(tmp_path)


def test_model_safetensors_comes_before_other_files(plain, copy):
    """A second format beside it (consolidated, an adapter) is not read."""
    save_file({"model.norm.weight": torch.zeros(128)}, copy / "consolidated.safetensors")
    assert_equal(load(copy), plain[1])


def test_files_of_other_names_are_read_together_if_no_tensor_is_in_two(plain, copy):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    save_file(tensors, copy / "one.safetensors")
    assert_equal(load(copy), plain[1])
    save_file({"model.norm.weight": torch.zeros(128)}, copy / "two.safetensors")
    with pytest.raises(ConfigError, match=r"model\.norm\.weight is in two"):
        load(copy)


YARN = {"factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("rope", "old"),
    [
        ({"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}),
        ({"rope_type": "yarn", **YARN}, {"rope_type": "yarn", **YARN}),
        ({"rope_type": "yarn", **YARN}, {"type": "yarn", "rope_type": "yarn", **YARN}),
        ({"rope_type": "default"}, None),
    ],
)
def test_rope_types_equal_transformers_in_both_forms_of_configuration(rope, old, tmp_path):
    """rope_parameters as transformers 5 writes it, and rope_scaling beside rope_theta as 4 did."""
    reference = make_base("llama2", tmp_path, rope_parameters={"rope_theta": 500.0, **rope})
    assert_equal(load(tmp_path), reference)
    edit(tmp_path, rope_parameters=None, rope_scaling=old, rope_theta=500.0)
    assert_equal(load(tmp_path), reference)


def test_a_rope_type_that_depends_on_the_length_is_refused(copy):
    edit(copy, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ConfigError, match="'dynamic'"):
        load(copy)


def test_tied_embeddings_need_no_head(tmp_path):
    """The head is the embedding itself, in memory once."""
    reference = make_base("llama2", tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    base = load(tmp_path)
    assert_equal(base, reference)
    assert base.other_bytes == base.decoder.embedding.nbytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported"),
        ({"hidden_size": None}, "missing key: hidden_size"),
        ({"hidden_size": "wide"}, "'wide'"),
        ({"num_attention_heads": 0, "head_dim": None}, "does not describe a model"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5"),
        ({"rope_parameters": {"rope_type": "linear"}}, "missing key: .*'factor'"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported"),
        ({"hidden_size": 64}, "configuration says"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\..* is missing"),
        ({"attention_bias": True}, r"q_proj\.bias is missing"),
        ({"vocab_size": 400}, r"embed_tokens\.weight is \[320, 128\].* should be \[400, 128\]"),
    ],
)
def test_a_configuration_that_does_not_fit_is_an_error_that_says_how(copy, changes, message):
    """Every failure is one of base.model, whatever went wrong below."""
    edit(copy, **changes)
    with pytest.raises(ConfigError, match=message) as e:
        load(copy)
    assert e.value.field == "base.model"
    assert e.value.message.startswith("base.model: ")
    assert str(copy) not in e.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "does not describe"), ("[]", "holds a list"), (None, "cannot be read")],
)
def test_a_configuration_that_cannot_be_read_is_an_error(copy, text, message):
    (copy / "config.json").unlink()
    if text is not None:
        (copy / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"^base\.model: .*{message}") as e:
        load(copy)
    assert str(copy) not in e.value.message


def test_a_bias_that_the_configuration_does_not_have_is_refused(copy):
    """Leaving it out would serve another model than the one that is stored."""
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.bias"] = torch.ones(128)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ConfigError, match=r"o_proj\.bias"):
        load(copy)


def test_a_file_that_is_no_safetensors_is_refused(copy):
    (copy / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ConfigError, match="Git LFS"):
        load(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no \.safetensors file"):
        load(copy)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [(7, [8, 9], {1, 8, 9}), ([6, 7], None, {1, 6, 7}), (7, {}, {1, 7}), (None, 8, {1, 8})],
)
def test_the_ends_are_those_of_the_generation_config(copy, config, generation, expected):
    """generation_config.json wins over config.json; the tokenizer's own (1) always counts."""
    edit(copy, eos_token_id=config)
    (copy / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        given = {} if generation == {} else {"eos_token_id": generation}
        (copy / "generation_config.json").write_text(json.dumps(given))
    assert load(copy).tokenizer.eos_ids == expected


def test_a_broken_tokenizer_is_an_error(copy):
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="its tokenizer cannot be read") as e:
        load(copy)
    assert e.value.field == "base.model"


def test_a_broken_generation_config_is_an_error(copy):
    (copy / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config\.json cannot be read"):
        load(copy)


def test_what_the_kernels_cannot_take_stays_dense(tmp_path):
    """k and v of 16 rows stay dense between 4-bit neighbours, and the sums are the same."""
    make_base("llama2", tmp_path, num_key_value_heads=1, head_dim=16, num_hidden_layers=1)
    sites = load(tmp_path, "nf4").decoder.layers[0].sites
    assert [type(p) for p in sites["qkv"].parts] == [NF4Weight, DenseWeight]
    assert [type(p) for p in sites["gate_up"].parts] == [NF4Weight]
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    whole = sites["qkv"].dequantise(torch.float32, 0, 96)
    torch.testing.assert_close(sites["qkv"].matmul(x), x @ whole.T)
