"""Keys of tensors: which matrix each means, however a trainer wrapped the model."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.adapters.tensor_keys import Place, parse_key
from mora_serve.errors import InvalidArgument
from mora_serve.model.shape import PROJECTIONS, projection_path

PLAIN = "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"
WRAPPED = [
    "model.layers.3.self_attn.q_proj.lora_A.weight",
    "module.base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight",
    "_orig_mod.base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight",
    "base_model.model._orig_mod.model.layers.3.self_attn.q_proj.lora_A.weight",
    "_fsdp_wrapped_module.base_model.model.model.layers.3._fsdp_wrapped_module."
    "_checkpoint_wrapped_module.self_attn.q_proj.lora_A.weight",
]


@pytest.mark.parametrize("key", [PLAIN, *WRAPPED])
def test_what_torch_wraps_a_module_in_does_not_change_which_matrix_is_meant(key: str) -> None:
    assert parse_key(key) == Place(3, "q_proj", "A")
    assert parse_key(key).path == "model.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embedding or the head"),
        ("base_model.model.lm_head.lora_A.weight", "embedding or the head"),
        ("base_model.model.lm_head.weight", "save_embedding_layers=False"),
        ("base_model.model.model.embed_tokens.weight", "vocabulary was resized"),
        (PLAIN.replace("lora_A", "base_layer"), "the base's own weights"),
        (PLAIN.replace("lora_A.weight", "lora_B.bias"), "lora_bias=False"),
        ("base_model.model.score.weight", "neither embeddings nor whole modules"),
        (PLAIN.replace("self_attn", "mlp"), "wrong block"),
        (PLAIN.replace("model.layers", "model.language_model.layers"), "UNSUPPORTED"),
        (PLAIN.replace("lora_A", "lora_a"), "UNSUPPORTED"),  # MLX: transposed
        ("x._orig_mod.y", "UNSUPPORTED"),
    ],
)
def test_another_tensor_is_refused_for_what_it_is(key: str, why: str) -> None:
    with pytest.raises(InvalidArgument) as e:
        parse_key(key)
    assert why in f"{e.value.reason} {e.value.message}"
    assert "; " in e.value.message


@given(
    st.integers(0, 99_999),
    st.sampled_from(PROJECTIONS),
    st.sampled_from(["A", "B", "magnitude_vector"]),
    st.sampled_from(["base_model.model.", ""]),
    st.sampled_from([".default.weight", ".weight", ".default", ""]),
)
def test_every_key_that_peft_writes_is_read_back(
    layer: int, projection: str, part: str, prefix: str, suffix: str
) -> None:
    key = f"{prefix}{projection_path(layer, projection)}.lora_{part}{suffix}"
    assert parse_key(key) == Place(layer, projection, part)


@given(st.text(max_size=80) | st.from_regex(r"[a-z_.0-9]{0,80}", fullmatch=True))
def test_any_text_is_a_place_or_a_refusal(key: str) -> None:
    with contextlib.suppress(InvalidArgument):
        assert parse_key(key).projection in PROJECTIONS
