"""Pooled hidden states: what transformers has at that depth, whatever is pooled beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.families import FAMILIES, make_base
from mora_serve.config import BaseConfig
from mora_serve.model import pooling
from mora_serve.model.loading import Base, load_base
from mora_serve.model.pooling import pool_states, pool_tokens, pooled_hidden

TEXTS = (
    *("Reverse the word 'kavo', please.", "ä", "", "x", "one two three " * 9),
    *("add 3 and 4", "Ω" * 40, "what is left of 'stone' without its vowels?"),
)


def load(directory, quantization="none", dtype="fp32") -> Base:
    return load_base(BaseConfig(str(directory), "main", quantization, dtype, "cpu"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("pooling")
    make_base("llama3", path)
    return path


@pytest.fixture(scope="module")
def base(directory) -> Base:
    return load(directory)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_states_are_the_mean_hidden_states_of_transformers(family, tmp_path):
    """At every depth, windows and grouped queries included; the last one before its norm."""
    reference = make_base(family, tmp_path, num_hidden_layers=3)
    base = load(tmp_path)
    for depth in range(4):
        states = pooled_hidden(base.decoder, base.tokenizer, TEXTS, depth, 512)
        for text, state in zip(TEXTS, states, strict=True):
            tokens = base.tokenizer.plain(text)
            if not tokens:
                assert not state.any()
                continue
            with torch.no_grad():
                ids = torch.tensor([tokens])
                hidden = reference(input_ids=ids, output_hidden_states=True).hidden_states[depth]
                if depth == 3:  # transformers gives the normalised one
                    hidden = last_residual(reference, ids)
            want = hidden[0].mean(0).numpy()
            assert np.linalg.norm(state - want) <= 1e-4 * np.linalg.norm(want)


def last_residual(reference, ids) -> torch.Tensor:
    """What enters the final norm."""
    seen = []
    hook = reference.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    reference(input_ids=ids)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("quantization", "dtype", "sizes"),
    [
        ("none", "fp32", {}),
        ("nf4", "bf16", {}),
        ("none", "fp32", {"intermediate_size": 101, "hidden_size": 100, "head_dim": 18}),
    ],
)
def test_a_state_has_the_same_bits_whatever_is_pooled_beside_it(
    quantization, dtype, sizes, tmp_path
):
    make_base("qwen2", tmp_path, **sizes)
    base = load(tmp_path, quantization, dtype)
    together = pooled_hidden(base.decoder, base.tokenizer, TEXTS, 2, 512)
    turned = pooled_hidden(base.decoder, base.tokenizer, TEXTS[::-1], 2, 512)[::-1]
    for text, a, b in zip(TEXTS, together, turned, strict=True):
        alone = pooled_hidden(base.decoder, base.tokenizer, [text], 2, 512)[0]
        assert a.tobytes() == b.tobytes() == alone.tobytes()


def test_many_texts_take_several_passes_and_keep_their_places(base, monkeypatch):
    whole = pooled_hidden(base.decoder, base.tokenizer, TEXTS, 1, 512)
    monkeypatch.setattr(pooling, "PASS_TOKENS", 40)
    assert pooled_hidden(base.decoder, base.tokenizer, TEXTS, 1, 512).tobytes() == whole.tobytes()


def test_depth_0_is_the_mean_embedding(base):
    (state,) = pooled_hidden(base.decoder, base.tokenizer, ["stone"], 0, 512)
    ids = torch.tensor(base.tokenizer.plain("stone"))
    want = base.decoder.embedding.rows(ids, torch.float32).mean(0)
    assert np.allclose(state, want.numpy(), atol=1e-6)


def test_tokens_are_the_text_s_own(base):
    """No special token, whatever the tokenizer adds to a prompt."""
    assert base.tokenizer.decode(pool_tokens(base.tokenizer, "stone", 512, 320)) == "stone"
    assert min(pool_tokens(base.tokenizer, "stone", 512, 320)) > 3


def test_a_long_text_counts_by_its_ends(base):
    """However long it is, the time of a few tokens; an odd limit leaves one out."""
    text = "reverse " + "lorem ipsum " * 1000 + "as json"
    tokens = pool_tokens(base.tokenizer, text, 16, 320)
    assert base.tokenizer.decode(tokens) == text[:8] + text[-8:]
    assert pool_tokens(base.tokenizer, text + text, 16, 320) == tokens
    assert len(pool_tokens(base.tokenizer, text, 17, 320)) == 16
    assert len(pool_tokens(base.tokenizer, text[:17], 17, 320)) == 17


def test_tokens_that_the_base_does_not_have_do_not_count(base):
    """A tokenizer may know more of them than the embedding has rows."""
    tokens = base.tokenizer.plain("abc")
    assert pool_tokens(base.tokenizer, "abc", 16, max(tokens)) == tokens[:2]


def test_a_pass_without_a_token_gives_zeros(base):
    assert not pool_states(base.decoder, [[], []], 2).any()
    assert pool_states(base.decoder, [], 2).shape == (0, 128)
