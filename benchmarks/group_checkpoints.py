"""GPTQ and AWQ checkpoints of small models, packed as GPTQModel and AutoAWQ pack them.

Weights are rounded to the nearest: what the formats hold is the same whoever chose the codes.
``stored_weights`` reads such a checkpoint back by the formats' definitions, bit by bit, and shares
no code with the server: with these weights transformers' own model is the oracle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]

# Of eight neighbouring outputs, the one that AWQ has at each place of a word.
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is to be quantised; ``method`` is gptq or awq.

    ``act_order`` puts the inputs into groups at random, as GPTQ's desc_act does by their size.
    ``v2`` writes zeros as they are, as gptq_v2 does. ``fold`` scales the inputs of the attention
    and of the feed-forward layer down, norms and weights making up for it, as AWQ does. ``head``
    quantises lm_head too.
    """

    method: str = "gptq"
    bits: int = 4
    group: int = 64
    symmetric: bool = True
    act_order: bool = False
    v2: bool = False
    fold: bool = False
    head: bool = False

    def config(self) -> dict[str, Any]:
        """quantization_config as the tools write it."""
        common = {"quant_method": self.method, "bits": self.bits, "group_size": self.group}
        if self.method == "awq":
            return {**common, "version": "gemm", "zero_point": True, "modules_to_not_convert": None}
        return {
            **common,
            "desc_act": self.act_order,
            "sym": self.symmetric,
            "checkpoint_format": "gptq_v2" if self.v2 else "gptq",
            "pack_dtype": "int32",
            "lm_head": self.head,
        }


def write(base: Path, directory: Path, recipe: Recipe, seed: int = 0) -> Path:
    """Quantise the 32-bit base in ``base`` into ``directory``, which is returned."""
    from safetensors.torch import load_file, save_file

    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(base / "model.safetensors")
    if recipe.fold:
        _fold(tensors, generator)
    out: dict[str, Tensor] = {}
    orders: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path = name.removesuffix(".weight")
        if path.endswith("_proj") or (path == "lm_head" and recipe.head):
            # layers with one input are quantised with one order, as GPTQ does by its Hessian
            one_input = path.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
            one_input = one_input.replace("up_proj", "gate_proj")
            if one_input not in orders:
                orders[one_input] = torch.randperm(tensor.shape[1], generator=generator)
            packed = _quantised(tensor, recipe, orders[one_input])
            out.update({f"{path}.{key}": value for key, value in packed.items()})
        else:
            out[name] = tensor.half()
    save_file(out, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = recipe.config()
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    for file in base.glob("*.json"):
        if file.name != "config.json" and not file.name.endswith(".index.json"):
            shutil.copy(file, directory / file.name)
    for file in base.glob("*.jinja"):
        shutil.copy(file, directory / file.name)
    return directory


def _fold(tensors: dict[str, Tensor], generator: torch.Generator) -> None:
    """x / s times W s is x times W: s goes into the norm before, as AWQ's search does."""
    for name in [n for n in tensors if n.endswith("layernorm.weight")]:
        scale = torch.rand(tensors[name].shape, generator=generator) * 1.5 + 0.5
        tensors[name] = tensors[name] / scale
        layer = name.rpartition(".")[0].rpartition(".")[0]
        attention = name.endswith("input_layernorm.weight")
        block = "self_attn" if attention else "mlp"
        for projection in ("q_proj", "k_proj", "v_proj") if attention else ("gate_proj", "up_proj"):
            key = f"{layer}.{block}.{projection}.weight"
            tensors[key] = tensors[key] * scale


def _quantised(weight: Tensor, recipe: Recipe, order: Tensor) -> dict[str, Tensor]:
    """The packed tensors of one [out, in] matrix, rounded to the nearest."""
    most = 2**recipe.bits - 1
    columns = weight.shape[1]
    size = columns if recipe.group == -1 else recipe.group
    places = order if recipe.act_order else torch.arange(columns)
    index = torch.empty(columns, dtype=torch.int32)
    index[places] = (torch.arange(columns) // size).int()
    scales, zeros = [], []
    for group in range(int(index.max()) + 1):
        part = weight[:, index == group]
        if recipe.symmetric and recipe.method == "gptq":
            scale = 2 * part.abs().amax(1) / most
            zero = torch.full_like(scale, (most + 1) // 2)
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scale = (high - low) / most
            zero = (-low / scale).round().clamp(0, most)
        scales.append(scale.half())
        zeros.append(zero)
    scale, zero = torch.stack(scales), torch.stack(zeros)  # [groups, out]
    codes = (weight.T / scale[index].float() + zero[index]).round().clamp(0, most)
    ints, whole = codes.long().numpy(), zero.long().numpy()
    if recipe.method == "awq":
        return {
            "qweight": _packed(_to_places(ints), 4),
            "qzeros": _packed(_to_places(whole), 4),
            "scales": scale,
        }
    packed = _packed(whole, recipe.bits)
    if not recipe.v2:
        packed -= sum(1 << recipe.bits * i for i in range(32 // recipe.bits))
    return {
        "qweight": _packed(ints.T, recipe.bits).T.contiguous(),
        "qzeros": packed,
        "scales": scale,
        "g_idx": index,
    }


def _to_places(ints: Ints) -> Ints:
    return ints.reshape(len(ints), -1, 8)[:, :, AWQ_PLACES].reshape(ints.shape)


def _packed(ints: Ints, bits: int) -> Tensor:
    """[n, m] -> int32 [n, m * bits / 32], the first number in the lowest bits."""
    words = ints.reshape(len(ints), -1, 32 // bits)
    total = sum(words[:, :, i] << bits * i for i in range(32 // bits))
    return torch.from_numpy(np.asarray(total, np.int64).astype(np.uint32).view(np.int32).copy())


# --- back again, for the oracle --------------------------------------------------------------


def stored_weights(directory: Path) -> dict[str, Tensor]:
    """Every tensor of transformers' unquantised model by name, float32, from a checkpoint's bits.

    An input k of output o has the weight scale[g][o] (code[k][o] - zero[g][o]), g being its group.
    """
    from safetensors.numpy import load_file

    tensors = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    out = {}
    for name, value in tensors.items():
        path, _, kind = name.rpartition(".")
        if kind == "qweight":
            part = {k: tensors[f"{path}.{k}"] for k in ("qzeros", "scales")}
            index = tensors.get(f"{path}.g_idx")
            out[f"{path}.weight"] = torch.from_numpy(_weight(value, part, index, config))
        elif kind not in ("qzeros", "scales", "g_idx"):
            out[name] = torch.from_numpy(value.astype(np.float32))
    return out


def _weight(
    qweight: npt.NDArray[np.int32],
    part: Mapping[str, npt.NDArray[Any]],
    index: npt.NDArray[np.int32] | None,
    config: Mapping[str, Any],
) -> npt.NDArray[np.float32]:
    bits = config["bits"]
    if config["quant_method"] == "gptq":
        codes = _numbers(np.ascontiguousarray(qweight.T), bits).T
        words = part["qzeros"].view(np.uint32)
        if config["checkpoint_format"] == "gptq":  # each zero less 1, borrowing of the next one
            words = words + np.uint32(int("1".rjust(bits, "0") * (32 // bits), 2))
        zeros = _numbers(words, bits)
    else:
        codes, zeros = _from_places(_numbers(qweight, 4)), _from_places(_numbers(part["qzeros"], 4))
    columns, outs = codes.shape
    size = columns if config["group_size"] == -1 else config["group_size"]
    weight = np.empty((outs, columns), np.float32)
    for k in range(columns):
        group = k // size if index is None else index[k]
        scale = part["scales"][group].astype(np.float32)
        weight[:, k] = scale * (codes[k] - zeros[group])
    return weight


def _numbers(words: npt.NDArray[Any], bits: int) -> Ints:
    """The numbers of ``bits`` bits in rows of words, lowest bits first."""
    flat = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    by_number = flat.reshape(len(words), -1, bits).astype(np.int64)
    return np.asarray(by_number @ (1 << np.arange(bits)))


def _from_places(ints: Ints) -> Ints:
    out = np.empty_like(ints)
    for place, output in enumerate(AWQ_PLACES):
        out[:, output::8] = ints[:, place::8]
    return out


def oracle(directory: Path, make: Callable[[], Any]) -> Any:
    """The transformers model that ``make`` gives, with a checkpoint's weights in it."""
    model = make()
    missing, unexpected = model.load_state_dict(stored_weights(directory), strict=False)
    left = [n for n in missing if not (n == "lm_head.weight" and model.config.tie_word_embeddings)]
    if left or unexpected:
        raise ValueError(f"{directory.name}: {left} missing, {unexpected} unexpected")
    model.tie_weights()
    return model.eval()
