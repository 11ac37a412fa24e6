"""Adapters that PEFT itself made: accepted as PEFT would apply them, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mora_serve.adapters.validate import read_directory
from mora_serve.errors import InvalidArgument
from mora_serve.model.shape import ModelShape, projection_path, shape_from_config
from tests.adapters.make import LIMITS

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and torch's own

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SERVED: dict[str, dict[str, Any]] = {
    "defaults": {},
    "all-linear": {"target_modules": "all-linear", "r": 2},
    "regular expression": {"target_modules": r".*\.[01]\.self_attn\.(q|v)_proj"},
    "one projection": {"target_modules": ["down_proj"], "r": 5, "lora_alpha": 7},
    "some layers": {"target_modules": SEVEN, "layers_to_transform": [1]},
    "excluded": {"target_modules": SEVEN, "exclude_modules": ["mlp.up_proj"]},
    "rsLoRA": {"target_modules": SEVEN, "use_rslora": True, "r": 6, "lora_alpha": 16},
    "DoRA": {"target_modules": SEVEN, "use_dora": True},
    "rsLoRA with DoRA": {"target_modules": SEVEN, "use_dora": True, "use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
    "mica": {"init_lora_weights": "mica", "r": 4},
    "rank patterns": {
        "target_modules": SEVEN,
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.(up|down)_proj": 16, "mlp.up_proj": 2},
    },
    "alpha patterns": {
        "target_modules": SEVEN,
        "alpha_pattern": {
            "^model.layers.0.self_attn.k_proj": 3,
            r".*\.mlp\..*": 5,
            "k_proj": 11,
            "attn.o_proj": 99,  # ends inside a component: matches nothing
        },
    },
    "patterns and rsLoRA": {
        "target_modules": SEVEN,
        "use_rslora": True,
        "rank_pattern": {"v_proj|o_proj": 4, "up_proj": 1},
        "alpha_pattern": {r"model\.layers\.[0-9]\.self_attn\.[a-z]_proj": 2.5},
    },
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "PiSSA by iterations": ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "trained tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "biases": ({"bias": "lora_only"}, "bias"),
    "biases of B": ({"lora_bias": True}, "lora_bias"),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "activated LoRA": ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
    "the head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
}


class Peft:
    """A tiny random base, and what PEFT saves for it."""

    def __init__(self, directory: Path) -> None:
        import peft
        import torch
        import transformers

        self.peft, self.torch, self.transformers = peft, torch, transformers
        self.directory = directory
        self.config = transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )

    @property
    def shape(self) -> ModelShape:
        return shape_from_config(self.config.to_dict())

    def save(self, config: Any, name: str, cast: Any = None) -> Any:
        """PEFT's model after its adapter was made random and saved under ``name``."""
        self.torch.manual_seed(0)
        base = self.transformers.LlamaForCausalLM(self.config)
        model = self.peft.get_peft_model(base, config)
        with self.torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_()
        model.to(cast).save_pretrained(self.directory / name)
        return model


@pytest.fixture(scope="module")
def peft_base(tmp_path_factory: pytest.TempPathFactory) -> Peft:
    return Peft(tmp_path_factory.mktemp("peft"))


@pytest.mark.parametrize("name", SERVED)
def test_what_peft_saves_is_served_with_the_scaling_of_peft(peft_base: Peft, name: str) -> None:
    config = peft_base.peft.LoraConfig(task_type="CAUSAL_LM", **SERVED[name])
    model = peft_base.save(config, name)
    adapter = read_directory(peft_base.directory, name, peft_base.shape, LIMITS)
    theirs = {
        key: module
        for key, module in model.get_base_model().named_modules()
        if isinstance(module, peft_base.peft.tuners.lora.LoraLayer)
    }
    assert {projection_path(m.layer, m.projection) for m in adapter.modules} == theirs.keys()
    assert adapter.dora == bool(config.use_dora)
    for m in adapter.modules:
        module = theirs[projection_path(m.layer, m.projection)]
        assert (m.rank, m.scaling) == (module.r["default"], module.scaling["default"])
        pairs = [(m.a, module.lora_A), (m.b, module.lora_B)]
        if m.magnitude is not None:
            pairs.append((m.magnitude, module.lora_magnitude_vector))
        for ref, by_adapter in pairs:
            values = by_adapter["default"].weight.detach().numpy()
            np.testing.assert_array_equal(adapter.array(ref), values)


def test_the_stored_configuration_is_one_that_peft_loads(peft_base: Peft) -> None:
    config = peft_base.peft.LoraConfig(**SERVED["patterns and rsLoRA"])
    model = peft_base.save(config, "stored")
    path = peft_base.directory / "stored"
    adapter = read_directory(peft_base.directory, "stored", peft_base.shape, LIMITS)
    (path / "adapter_config.json").write_bytes(adapter.config)
    again = peft_base.peft.PeftModel.from_pretrained(model.unload(), path)
    ids = peft_base.torch.arange(20)[None]
    expected = peft_base.save(config, "again").eval()(ids).logits
    peft_base.torch.testing.assert_close(again.eval()(ids).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_adapters_in_sixteen_bits_are_read_bit_by_bit(peft_base: Peft, dtype: str) -> None:
    torch = peft_base.torch
    model = peft_base.save(peft_base.peft.LoraConfig(), dtype, getattr(torch, dtype))
    adapter = read_directory(peft_base.directory, dtype, peft_base.shape, LIMITS)
    m = adapter.modules[0]
    theirs = model.get_submodule(
        f"base_model.model.{projection_path(m.layer, m.projection)}.lora_A.default"
    )
    bits = theirs.weight.detach().view(torch.int16).numpy()
    np.testing.assert_array_equal(adapter.array(m.a).view(np.int16), bits)


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_more_than_projections_is_refused_by_name(peft_base: Peft, name: str) -> None:
    changes, key = REFUSED[name]
    peft_base.save(peft_base.peft.LoraConfig(**{"target_modules": ["q_proj"]} | changes), name)
    with pytest.raises(InvalidArgument, match=key) as e:
        read_directory(peft_base.directory, name, peft_base.shape, LIMITS)
    assert e.value.reason == "UNSUPPORTED_ADAPTER"
    assert str(peft_base.directory) not in e.value.message


OTHER_TUNERS: dict[str, Callable[[Any], Any]] = {
    "IA3": lambda peft: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "VeRA": lambda peft: peft.VeraConfig(target_modules=["q_proj", "o_proj"], r=2),
    "LoHa": lambda peft: peft.LoHaConfig(target_modules=["q_proj"], r=2),
}


@pytest.mark.parametrize("name", OTHER_TUNERS)
def test_other_tuners_are_refused(peft_base: Peft, name: str) -> None:
    peft_base.save(OTHER_TUNERS[name](peft_base.peft), name)
    with pytest.raises(InvalidArgument, match=f"peft_type is '{name.upper()}'"):
        read_directory(peft_base.directory, name, peft_base.shape, LIMITS)


def test_a_pissa_adapter_converted_to_plain_lora_is_served(peft_base: Peft) -> None:
    """The remedy that the refusal names works; the conversion doubles the rank."""
    torch, directory = peft_base.torch, peft_base.directory
    torch.manual_seed(0)
    base = peft_base.transformers.LlamaForCausalLM(peft_base.config)
    config = peft_base.peft.LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"], r=4)
    model = peft_base.peft.get_peft_model(base, config)
    model.save_pretrained(directory / "start")
    model.save_pretrained(
        directory / "converted", path_initial_model_for_weight_conversion=str(directory / "start")
    )
    adapter = read_directory(directory, "converted", peft_base.shape, LIMITS)
    assert {m.rank for m in adapter.modules} == {8}
