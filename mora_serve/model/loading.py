"""Loading a base: a Hugging Face directory or hub id -> Decoder, tensor by tensor.

16- and 32-bit safetensors are quantised as they are read, so the model is never in memory in 16
bits as a whole; a checkpoint in bitsandbytes' 4-bit format, GPTQ or AWQ is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mora_serve.config import BaseConfig
from mora_serve.errors import ConfigError
from mora_serve.model import quant
from mora_serve.model.checkpoint import Checkpoint
from mora_serve.model.decoder import Decoder, Layer
from mora_serve.model.files import described, eos_ids, read_config, resolve
from mora_serve.model.footprint import can_quantise
from mora_serve.model.group_checkpoint import METHODS, GroupFormat, read_format
from mora_serve.model.shape import SITES, ModelShape, projection_path
from mora_serve.model.shard import Group, Shard, cut
from mora_serve.model.tokenizer import Tokenizer

Part = tuple[slice, slice]
Progress = Callable[[int, int], None]


def dtype_name(dtype: torch.dtype) -> str:
    """A type by the configuration's word."""
    name = str(dtype).removeprefix("torch.")
    return {"bfloat16": "bf16", "float32": "fp32"}.get(name, name)


@dataclass(frozen=True)
class BaseFiles:
    """A base by its files, weights apart: all that is needed to encode rows and to plan."""

    directory: Path
    shape: ModelShape
    tokenizer: Tokenizer
    fingerprint: str


@dataclass(frozen=True)
class Base:
    """The resident model with what the server says about it.

    Where ranks share it, ``shape`` is that of the whole, and the decoder is this rank's part.
    """

    name: str
    shape: ModelShape
    decoder: Decoder
    tokenizer: Tokenizer
    fingerprint: str
    quantization: str

    @property
    def dtype(self) -> str:
        """What it computes in, by the configuration's word."""
        return dtype_name(self.decoder.dtype)

    @property
    def device(self) -> str:
        """What it computes on, in torch's words."""
        return str(self.decoder.device)

    @property
    def linear_bytes(self) -> int:
        """Bytes resident of the layers' weights."""
        return sum(s.nbytes for layer in self.decoder.layers for s in layer.sites.values())

    @property
    def other_bytes(self) -> int:
        """Bytes resident of embedding and head."""
        decoder = self.decoder
        head = 0 if self.shape.tied_embeddings else decoder.head.nbytes
        return decoder.embedding.nbytes + head


def load_base(
    config: BaseConfig, progress: Progress | None = None, group: Group | None = None
) -> Base:
    """Load the base that ``config`` names; ``progress(done, total)`` is called a layer.

    With a ``group`` only what its rank holds, on the group's device.

    Raises ConfigError for an unsupported architecture or rope type, a missing or unreadable file
    or tensor, a device that is not there, or a shape that so many ranks cannot share.
    """
    directory = resolve(config.model, config.revision)
    hf, shape, rope = _read_config(directory)
    ends = eos_ids(directory, hf)
    device = _device(config.device) if group is None else group.device
    storage = storage_of(config.quantization, hf)
    shard = None
    if group is not None:
        shard = Shard.of(shape, group.rank, group.size, quantised=storage == "nf4")
    dtype = _dtype(config.dtype, device)
    with Checkpoint(directory, device) as checkpoint:
        decoder = _decoder(checkpoint, shape, rope, dtype, storage, progress, shard, group)
        tokenizer = Tokenizer.load(directory, ends)
        return Base(
            name=Path(config.model).name,
            shape=shape,
            decoder=decoder,
            tokenizer=tokenizer,
            fingerprint=_fingerprint(shape, tokenizer, checkpoint),
            quantization=storage.name if isinstance(storage, GroupFormat) else storage,
        )


def read_base(model: str, revision: str = "main") -> BaseFiles:
    """The base of a directory, hub id, or 'demo', without its linear weights.

    Raises ConfigError as ``load_base`` does.
    """
    directory = resolve(model, revision)
    hf, shape, _ = _read_config(directory)
    tokenizer = Tokenizer.load(directory, eos_ids(directory, hf))
    with Checkpoint(directory, torch.device("cpu")) as checkpoint:
        return BaseFiles(directory, shape, tokenizer, _fingerprint(shape, tokenizer, checkpoint))


def storage_of(wanted: str, hf: Mapping[str, Any]) -> str | GroupFormat:
    """How the linear layers are kept: "nf4", "none", or in the groups of the checkpoint.

    ``wanted`` is base.quantization, ``hf`` the checkpoint's configuration. Raises ConfigError
    where they do not go together.
    """
    stored = hf.get("quantization_config")
    if not stored:
        return "none" if wanted == "none" else "nf4"
    config: Mapping[str, Any] = stored if isinstance(stored, dict) else {}
    method = config.get("quant_method")
    if method not in ("bitsandbytes", *METHODS):
        raise ConfigError(
            f"base.model: stored as {str(method)[:60]!r}; bitsandbytes' 4-bit format, gptq, awq "
            "and plain 16/32-bit safetensors are supported",
            field="base.model",
        )
    storage = "nf4" if method == "bitsandbytes" else read_format(config)
    if wanted == "none":
        bits = 4 if isinstance(storage, str) else storage.bits
        raise ConfigError(
            "base.quantization: 'none' asks for unquantised weights, but the checkpoint is "
            f"already {bits}-bit; use 'auto' or a 16-bit checkpoint",
            field="base.quantization",
        )
    if wanted == "nf4" and isinstance(storage, GroupFormat):
        raise ConfigError(
            f"base.quantization: 'nf4' asks for NF4, but the checkpoint is {storage.name}, and "
            "rounding it again would lose what it was made for; use 'auto' or a 16-bit checkpoint",
            field="base.quantization",
        )
    return storage


def _read_config(directory: Path) -> tuple[dict[str, Any], ModelShape, tuple[Tensor, float]]:
    """What config.json holds, the shape that it describes, and its rope frequencies."""
    hf, shape = read_config(directory)
    with described():
        return hf, shape, rope_frequencies(shape)


def _decoder(
    checkpoint: Checkpoint,
    shape: ModelShape,
    rope: tuple[Tensor, float],
    dtype: torch.dtype,
    storage: str | GroupFormat,
    progress: Progress | None,
    shard: Shard | None = None,
    group: Group | None = None,
) -> Decoder:
    biased = {
        "qkv": shape.qkv_bias,
        "o": shape.o_bias,
        "gate_up": shape.mlp_bias,
        "down": shape.mlp_bias,
    }
    hidden = (shape.hidden_size,)
    layers = []
    for i in range(shape.layers):
        prefix = f"model.layers.{i}"
        sites = {}
        for site, projections in SITES.items():
            paths = [projection_path(i, p) for p in projections]
            sizes = [shape.projection(p) for p in projections]
            cuts = [None if shard is None else shard.part(p) for p in projections]
            parts = [
                _weight(checkpoint, path, size, dtype, storage, part)
                for path, size, part in zip(paths, sizes, cuts, strict=True)
            ]
            biases = [f"{path}.bias" for path in paths]
            bias = None
            if biased[site]:
                whole = [
                    checkpoint.tensor(b, dtype, n[:1]) for b, n in zip(biases, sizes, strict=True)
                ]
                bias = torch.cat(
                    [b if c is None else b[c[0]] for b, c in zip(whole, cuts, strict=True)]
                )
            elif stray := [b for b in biases if b in checkpoint and not _nothing(checkpoint, b)]:
                raise ConfigError(
                    f"base.model: there is a tensor {stray[0]}, but by the configuration this "
                    "architecture has no such bias; check that both are of one model",
                    field="base.model",
                )
            sites[site] = quant.fuse(parts, bias)
        norms = [f"{prefix}.self_attn.{n}_norm.weight" for n in "qk"] if shape.qk_norm else []
        layers.append(
            Layer(
                checkpoint.tensor(f"{prefix}.input_layernorm.weight", dtype, hidden),
                checkpoint.tensor(f"{prefix}.post_attention_layernorm.weight", dtype, hidden),
                sites,
                *(checkpoint.tensor(n, dtype, (shape.head_dim,)) for n in norms),
            )
        )
        if progress is not None:
            progress(i + 1, shape.layers)
    table = (shape.vocab_size, shape.hidden_size)
    embedding = quant.DenseWeight(checkpoint.tensor("model.embed_tokens.weight", dtype, table))
    rows = slice(0, shape.vocab_size) if shard is None else shard.vocabulary
    part = None if shard is None else (rows, slice(0, shape.hidden_size))
    head: quant.Weight
    if "lm_head.qweight" in checkpoint:
        if shape.tied_embeddings:
            raise ConfigError(
                "base.model: there is a tensor lm_head.qweight, but by the configuration the "
                "head is the embedding; check that both are of one model",
                field="base.model",
            )
        head = _weight(checkpoint, "lm_head", table, dtype, storage, part)
    elif not shape.tied_embeddings:
        head = quant.DenseWeight(checkpoint.tensor("lm_head.weight", dtype, table, part))
    else:
        head = embedding if shard is None else quant.DenseWeight(embedding.weight[rows])
    norm = checkpoint.tensor("model.norm.weight", dtype, hidden)
    local = shape if shard is None else shard.local
    return Decoder(local, embedding, layers, norm, head, *rope, shard, group)


def _weight(
    checkpoint: Checkpoint,
    path: str,
    size: tuple[int, int],
    dtype: torch.dtype,
    storage: str | GroupFormat,
    part: Part | None = None,
) -> quant.Stackable:
    """The linear layer at ``path``, of ``size`` (out, in), or a ``part`` of it.

    In whatever form it is there; what is quantised here is quantised alone.
    """
    name = f"{path}.weight"
    if f"{path}.qweight" in checkpoint:
        if isinstance(storage, GroupFormat):
            return _part_of(path, storage.weight(checkpoint, path, dtype), size, part)
        raise ConfigError(
            f"base.model: {path} is stored in groups, but config.json has no quantization_config "
            "of gptq or awq that says how; take it over from quantize_config.json",
            field="base.model",
        )
    if f"{name}.absmax" in checkpoint:
        state = {
            key.removeprefix(f"{path}."): checkpoint.tensor(key) for key in checkpoint.beside(name)
        }
        weight = quant.from_checkpoint(checkpoint.tensor(name), state, path)
        return _part_of(path, weight, size, part)
    found = checkpoint.size(name)
    tensor = checkpoint.tensor(name, part=part if found == size else None)
    if not tensor.is_floating_point():
        raise ConfigError(
            f"base.model: {path} is stored as {tensor.dtype}; only 16/32-bit floats, "
            "bitsandbytes' 4-bit format, gptq and awq are supported",
            field="base.model",
        )
    _check_size(path, found, size)
    if storage == "nf4" and can_quantise(*tensor.shape):
        return quant.quantise(tensor)
    return quant.DenseWeight(tensor.to(dtype, copy=True))


def _nothing(checkpoint: Checkpoint, bias: str) -> bool:
    """Whether a bias that the architecture does not have is one of zeros beside a GPTQ weight."""
    beside = bias.removesuffix("bias") + "qweight"
    return beside in checkpoint and not bool(checkpoint.tensor(bias).any())


def _part_of(
    path: str, weight: quant.Stackable, size: tuple[int, int], part: Part | None
) -> quant.Stackable:
    _check_size(path, weight.shape, size)
    return weight if part is None else cut(weight, part)


def _check_size(path: str, found: tuple[int, ...], size: tuple[int, int]) -> None:
    if found != size:
        raise ConfigError(
            f"base.model: {path.removeprefix('model.')} is {list(found)}, the configuration says "
            f"{list(size)}; check that both are of one model",
            field="base.model",
        )


def rope_frequencies(shape: ModelShape) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] and the scale of cos and sin, as transformers has them.

    Raises ConfigError for a type whose frequencies depend on the length of the text.
    """
    kind = str(shape.rope["rope_type"])
    if kind == "default":
        exponent = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
        return 1.0 / (float(shape.rope["rope_theta"]) ** exponent), 1.0
    if kind not in ("linear", "llama3", "yarn"):
        raise ConfigError(
            f"base.model: rope type {kind!r} is not supported; "
            "default, linear, llama3 and yarn are",
            field="base.model",
        )
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        head_dim=shape.head_dim,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.max_positions,
        rope_parameters=dict(shape.rope),
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies, float(scale)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"base.device: {name!r} is not auto, cpu, cuda or cuda:N", field="base.device"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"base.device: {name!r} asked for, but torch sees no CUDA device", field="base.device"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"base.device: {name!r} asked for, but torch sees {torch.cuda.device_count()} CUDA "
            "device(s), counted from cuda:0",
            field="base.device",
        )
    return device


def rank_device(name: str, rank: int, ranks: int) -> torch.device:
    """The device of one of several ranks: a card each, counted from the one named, or the CPU.

    Raises ConfigError for a device that is not there.
    """
    first = _device(name)
    if first.type == "cpu":
        return first
    index, there = first.index or 0, torch.cuda.device_count()
    if index + ranks > there:
        raise ConfigError(
            f"engine.tensor_parallel: {ranks} ranks need as many cards from cuda:{index} on, but "
            f"torch sees {there} CUDA device(s); lower it",
            field="engine.tensor_parallel",
        )
    return torch.device("cuda", index + rank)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        if device.type == "cuda":
            with torch.cuda.device(device):
                fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported()
        name = "bf16" if fast else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


def _fingerprint(shape: ModelShape, tokenizer: Tokenizer, checkpoint: Checkpoint) -> str:
    """Hash what a 16-bit and a 4-bit copy share: sizes, vocabulary, embeddings and norms.

    Values are rounded to bfloat16 first, so that a float32 original and its 16-bit copy agree, and
    then to float16, in which GPTQ and AWQ copies of a bfloat16 original often are.
    """
    digest = hashlib.sha256()
    sizes = (
        *(shape.vocab_size, shape.hidden_size, shape.intermediate_size, shape.layers),
        *(shape.heads, shape.kv_heads, shape.head_dim),
    )
    digest.update(json.dumps([shape.model_type, *sizes]).encode())
    digest.update(json.dumps(sorted(tokenizer.vocabulary().items())).encode())
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    for i in range(shape.layers):
        names += [
            f"model.layers.{i}.{norm}.weight"
            for norm in ("input_layernorm", "post_attention_layernorm")
        ]
    for name in names:
        tensor = checkpoint.on_host(name).flatten()
        for start in range(0, tensor.numel(), 1 << 22):
            part = tensor[start : start + (1 << 22)]
            rounded = part.to(torch.bfloat16).half().bfloat16()
            digest.update(rounded.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
