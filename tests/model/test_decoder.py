"""The decoder against transformers, family by family."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.families import FAMILIES, make_base
from mora_serve.config import BaseConfig
from mora_serve.errors import ConfigError
from mora_serve.model.attention import DenseCausal, SomeQueries
from mora_serve.model.decoder import Wanted
from mora_serve.model.loading import load_base
from mora_serve.model.shape import shape_from_config
from mora_serve.model.stacked import StackedAdapters

SLIDING = {"use_sliding_window": True, "sliding_window": 24}


def difference(reference, directory) -> float:
    """Relative distance of the loaded base's logits from those of transformers' model."""
    base = load_base(BaseConfig(str(directory), quantization="none", dtype="fp32", device="cpu"))
    ids = torch.randint(2, 320, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = reference(input_ids=ids).logits
        positions = torch.arange(40).repeat(2)
        attention = DenseCausal(2, 40, base.shape.sliding_window)
        got = base.decoder.logits(base.decoder.hidden(ids.flatten(), positions, attention))
    return float((got.view_as(want) - want).norm() / want.norm())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_equal_transformers(family, tmp_path):
    """Unquantised fp32 logits of every supported family equal transformers' to 1e-4."""
    assert difference(make_base(family, tmp_path), tmp_path) < 1e-4


@pytest.mark.parametrize(
    ("family", "changes", "window"),
    [
        ("qwen2", {**SLIDING, "max_window_layers": 0}, 24),
        ("qwen3", {**SLIDING, "max_window_layers": 0}, 24),
        ("qwen2", {**SLIDING, "max_window_layers": 2}, None),
        ("qwen3", {**SLIDING, "max_window_layers": 28}, None),
        ("qwen2", {**SLIDING, "use_sliding_window": False, "max_window_layers": 0}, None),
        ("mistral", {"sliding_window": None}, None),
    ],
)
def test_the_window_is_that_of_transformers(family, changes, window, tmp_path):
    """Layer i of a Qwen slides from max_window_layers on, and every layer of a Mistral does.

    The window is shorter than the text, so that one in the wrong place shows. Older configuration
    files have no layer_types: without them the result is the same.
    """
    reference = make_base(family, tmp_path, **changes)
    config = json.loads((tmp_path / "config.json").read_text())
    for written in (config, {k: v for k, v in config.items() if k != "layer_types"}):
        # transformers writes None where the switch is off; files of others keep the number
        written["sliding_window"] = changes["sliding_window"]
        (tmp_path / "config.json").write_text(json.dumps(written))
        assert shape_from_config(written).sliding_window == window
        assert difference(reference, tmp_path) < 1e-4


def test_a_llama_has_no_window_whatever_its_configuration_says(tmp_path):
    """A stray sliding_window changes nothing, as in transformers."""
    reference = make_base("llama2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sliding_window": 8}))
    assert difference(reference, tmp_path) < 1e-4


def test_windows_on_some_layers_are_refused(tmp_path):
    """The decoder has one window for all layers; a mixture of both is not served wrongly."""
    make_base("qwen2", tmp_path, **SLIDING, max_window_layers=1)
    with pytest.raises(ConfigError, match=r"^base\.model: .*some layers"):
        load_base(BaseConfig(str(tmp_path)))


def test_biases_of_every_projection_are_applied(tmp_path):
    """A Llama with attention_bias and mlp_bias has one on each of its seven projections."""
    reference = make_base("llama2", tmp_path, attention_bias=True, mlp_bias=True)
    assert difference(reference, tmp_path) < 1e-4


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("wanted", [[3, 4, 5, 21, 25], [0], list(range(30)), [29]])
def test_wanted_tokens_have_the_states_that_all_would_give_them(wanted, window, tmp_path):
    """The last layer may leave out tokens nobody reads, with a mixture of their own a row."""
    make_base("qwen3", tmp_path)
    config = BaseConfig(str(tmp_path), dtype="fp32", device="cpu")
    base = load_base(config)
    torch.manual_seed(0)
    adapters = StackedAdapters(base.shape, 2, rank=2, alpha=4)
    for b in adapters.b.parameters():
        torch.nn.init.normal_(b, std=0.1)
    mixture = adapters.mix(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.5, 1.0]]), length=10)
    ids, positions = torch.randint(2, 320, (30,)), torch.arange(10).repeat(3)
    attention, index = DenseCausal(3, 10, window), torch.tensor(wanted)
    some = Wanted(index, SomeQueries(index, 3, 10, window), mixture.at(index))
    states = base.decoder.hidden(ids, positions, attention, mixture)
    torch.testing.assert_close(
        base.decoder.hidden(ids, positions, attention, mixture, some), states[index]
    )


def test_dense_is_the_quantised_decoder(tmp_path):
    """Dequantised once, a 4-bit base gives the states that it gives otherwise."""
    make_base("qwen2", tmp_path)
    decoder = load_base(BaseConfig(str(tmp_path), dtype="fp32", device="cpu")).decoder
    ids, positions, attention = torch.arange(2, 22), torch.arange(20), DenseCausal(1, 20)
    dense = decoder.dense()
    assert torch.equal(
        dense.hidden(ids, positions, attention), decoder.hidden(ids, positions, attention)
    )
    assert dense.layers[0].sites["qkv"].nbytes > 6 * decoder.layers[0].sites["qkv"].nbytes
