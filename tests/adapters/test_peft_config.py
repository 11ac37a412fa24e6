"""adapter_config.json: what can be served is understood, anything else refused by its key."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.adapters.peft_config import parse_config
from mora_serve.errors import InvalidArgument
from tests.adapters.make import config


def parse(**changes: Any) -> Any:
    return parse_config(json.dumps(config(**changes)).encode())


def test_what_decides_the_computation_is_read() -> None:
    settings = parse(
        lora_alpha=12,
        use_rslora=True,
        use_dora=True,
        rank_pattern={"q_proj": 16},
        alpha_pattern={"mlp.*": 1.5},
    )
    assert (settings.r, settings.lora_alpha) == (4, 12)
    assert settings.use_rslora
    assert settings.use_dora
    assert settings.ranks().get("model.layers.0.self_attn.q_proj", settings.r) == 16
    assert settings.alphas().get("model.layers.0.mlp.up_proj", settings.lora_alpha) == 1.5
    assert settings.scaling(12, 16) == 12 / math.sqrt(16)


def test_scaling_is_alpha_by_rank_unless_it_is_rank_stabilised() -> None:
    assert parse().scaling(8, 4) == 2.0
    assert parse(use_rslora=True).scaling(8, 4) == 4.0


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("peft_type", "IA3", "LoraConfig"),
        ("peft_type", "VERA", "LoraConfig"),
        ("peft_type", None, "LoraConfig"),
        ("init_lora_weights", "pissa", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "pissa_niter_16", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "OLoRA", "changes the base"),
        ("init_lora_weights", "corda", "changes the base"),
        ("init_lora_weights", "loftq", "changes the base"),
        ("init_lora_weights", "lora_ga", "changes the base"),
        ("init_lora_weights", "brand-new", "not known"),
        ("init_lora_weights", ["pissa"], "not known"),
        ("bias", "all", 'bias="none"'),
        ("bias", "lora_only", 'bias="none"'),
        ("bias", None, 'bias="none"'),
        ("modules_to_save", ["lm_head"], "replaces whole modules"),
        ("trainable_token_indices", [1, 2], "embeddings"),
        ("layer_replication", [[0, 2]], "layers"),
        ("lora_bias", True, "biases"),
        ("megatron_config", {"a": 1}, "Megatron"),
        ("alora_invocation_tokens", [5], "aLoRA"),
        ("use_qalora", True, "QALoRA"),
        ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
        ("use_mora", True, "MoRA"),
        ("velora_config", {"num_groups": 64}, "VeLoRA"),
        ("monteclora_config", {"num_samples": 8}, "MonteCLoRA"),
        ("kasa_config", {"beta": 1}, "KaSA"),
        ("arrow_config", {"top_k": 2}, "Arrow"),
        ("target_parameters", ["experts.gate_up_proj"], "parameters"),
        ("auto_map", {"AutoModel": "evil.Model"}, "not known"),
        ("brand_new", 0, "not known"),
        ("r", 0, "positive integer"),
        ("r", "8", "positive integer"),
        ("r", True, "positive integer"),
        ("r", 8.0, "positive integer"),
        ("rank_pattern", {"q_proj": -1}, "positive integer"),
        ("rank_pattern", ["q_proj"], "object"),
        ("lora_alpha", "16", "finite number"),
        ("lora_alpha", 1e300, "finite number"),
        ("alpha_pattern", {"q_proj": None}, "finite number"),
        ("use_rslora", "yes", "true or false"),
        ("use_dora", 1, "true or false"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_key_the_reason_and_a_remedy(
    key: str, value: Any, why: str
) -> None:
    with pytest.raises(InvalidArgument) as e:
        parse(**{key: value})
    assert e.value.reason == "UNSUPPORTED_ADAPTER"
    assert key in e.value.message
    assert why in e.value.message
    assert "; " in e.value.message


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": name}
        for name in (True, False, None, "gaussian", "eva", "orthogonal", "mica")
    ]
    + [
        {"modules_to_save": None, "trainable_token_indices": None, "layer_replication": None},
        {"modules_to_save": [], "lora_bias": False, "fan_in_fan_out": True},
        {"nvfp4_merge_aware": {"scale_mode": "fresh", "encoder": None}},
        {"some_future_switch": False, "some_future_list": [], "some_future_table": {}},
        {"some_future_text": "", "some_future_value": None},
        {"target_modules": "all-linear", "exclude_modules": ["lm_head"]},
        {"target_modules": r".*\.(q|v)_proj", "layers_to_transform": [0], "lora_dropout": 0.1},
        {"rank_pattern": None, "alpha_pattern": None, "use_rslora": None},
        {"corda_config": {"corda_method": "ipm"}, "loftq_config": {}, "lora_alpha": 11.3},
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM"}, "task_type": None},
    ],
)
def test_what_changes_nothing_is_accepted(changes: dict[str, Any]) -> None:
    assert parse(**changes).r == 4


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"r": 1, "r": 2}', b'{"r": Infinity}', b"\0"])
def test_what_is_no_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidArgument, match=r"^adapter_config\.json: ") as e:
        parse_config(text)
    assert e.value.reason == "INVALID_JSON"


def test_a_configuration_beyond_a_mebibyte_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="1048576"):
        parse_config(json.dumps(config(base_model_name_or_path="x" * (1 << 20))).encode())


def test_the_canonical_form_holds_what_decides_and_nothing_of_where_it_came_from() -> None:
    """Saved twice, by another version, from another directory: the same content."""
    plain = parse(lora_alpha=16).canonical(["v_proj", "q_proj"])
    noisy = parse(
        lora_alpha=16.0,
        base_model_name_or_path="/home/somebody/llama",
        peft_version="0.1",
        lora_dropout=0.5,
        alpha_pattern=None,
    ).canonical(["q_proj", "v_proj"])
    assert plain == noisy
    assert plain != parse(lora_alpha=17).canonical(["v_proj", "q_proj"])
    assert parse_config(plain) == parse(lora_alpha=16)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(
    st.sampled_from(
        [
            "r",
            "lora_alpha",
            "rank_pattern",
            "alpha_pattern",
            "use_dora",
            "bias",
            "peft_type",
            "init_lora_weights",
            "modules_to_save",
            "new",
        ]
    ),
    json_values,
)
def test_any_value_under_any_key_is_accepted_or_refused(key: str, value: Any) -> None:
    with contextlib.suppress(InvalidArgument):
        assert parse(**{key: value}).r >= 1


def test_transposed_weights_are_refused_where_a_magnitude_may_have_been_taken_of_them() -> None:
    """Plain LoRA computes the same with and without: PEFT sets it to false on linear layers."""
    with pytest.raises(InvalidArgument, match=r"fan_in_fan_out.*magnitudes"):
        parse(fan_in_fan_out=True, use_dora=True)
