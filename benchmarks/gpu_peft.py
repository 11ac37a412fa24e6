"""PEFT's mixed batch on the very same 4-bit weights: one adapter a row, by ``adapter_names``."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch

from benchmarks.gpu_card import wait
from benchmarks.oracle import generated
from benchmarks.report import log
from mora_serve.model.attention import DenseCausal
from mora_serve.model.footprint import BLOCK
from mora_serve.model.kernels.four_bit import FourBitProduct
from mora_serve.model.loading import Base
from mora_serve.model.quant import NF4Weight
from mora_serve.model.shape import PROJECTIONS, SITES


def measure(base: Base, rows: int, rank: int, prompt: int, tokens: int) -> dict[str, Any]:
    """Tokens a second of ``rows`` rows with as many adapters, the prompts' step apart.

    ``logits_error`` says how far the model's logits are from our decoder's, relative: both must be
    the same base. Where bitsandbytes cannot be used the weights are the same in 16 bits, as
    ``weights`` says.
    """
    model = transformers_model(base)
    error = logits_error(base, model)
    peft = with_adapters(model, rows, rank)
    ids = torch.randint(4, base.shape.vocab_size, (rows, prompt), device=base.decoder.device)
    names = [f"a{i}" for i in range(rows)]

    def generate(count: int) -> float:
        wait(base.decoder.device)
        start = time.perf_counter()
        with torch.inference_mode():
            generated(peft, ids, count, adapter_names=names)
        wait(base.decoder.device)
        return time.perf_counter() - start

    generate(2)
    first = min(generate(1) for _ in range(2))
    step = (min(generate(1 + tokens) for _ in range(2)) - first) / tokens
    log(f"PEFT's mixed batch of {rows}: {1e3 * step:.1f} ms a step")
    return {
        "rows": rows,
        "step_seconds": step,
        "tokens_per_second": rows / step,
        "logits_error": error,
        "weights": "nf4" if has_bitsandbytes() else str(base.decoder.dtype),
    }


def has_bitsandbytes() -> bool:
    """Whether it can be imported."""
    try:
        import bitsandbytes  # noqa: F401 - to see whether it can
    except (ImportError, OSError):
        return False
    return True


def transformers_model(base: Base) -> Any:
    """transformers' Llama with bitsandbytes' linears over the base's own codes, or dense ones."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    shape, decoder = base.shape, base.decoder
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=shape.rms_norm_eps,
        rope_parameters=dict(shape.rope),
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(decoder.dtype)

    def parameter(tensor: torch.Tensor) -> Any:
        return torch.nn.Parameter(tensor, requires_grad=False)

    def dense(weight: NF4Weight, start: int, rows: int) -> Any:
        made = torch.nn.Linear(weight.shape[1], rows, False, device="meta", dtype=decoder.dtype)
        part = slice(start, start + rows)
        whole = NF4Weight(weight.codes[part], weight.absmax[part])
        made.weight = parameter(product.dense(whole, decoder.dtype))
        return made

    def linear(weight: NF4Weight, start: int, rows: int) -> Any:
        from bitsandbytes.nn import Linear4bit

        made = Linear4bit(
            *(weight.shape[1], rows, False),
            compute_dtype=decoder.dtype,
            quant_type="nf4",
            device="meta",
        )
        made.weight = packed(weight, start, rows, decoder.dtype)
        return made

    product, make = FourBitProduct(decoder.device, decoder.dtype), linear
    if not has_bitsandbytes():
        make = dense
    for layer, module in zip(decoder.layers, model.model.layers, strict=True):
        for site, names in SITES.items():
            (whole,) = layer.sites[site].parts
            start = 0
            for name in names:
                rows, _ = shape.projection(name)
                block = module.mlp if hasattr(module.mlp, name) else module.self_attn
                setattr(block, name, make(whole, start, rows))  # type: ignore[arg-type]
                start += rows
        module.input_layernorm.weight = parameter(layer.input_norm)
        module.post_attention_layernorm.weight = parameter(layer.post_norm)
    model.model.embed_tokens.weight = parameter(decoder.embedding.dequantise(decoder.dtype))
    model.model.norm.weight = parameter(decoder.norm)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(decoder.device)
    model.lm_head.weight = parameter(decoder.head.dequantise(decoder.dtype))
    model.generation_config.eos_token_id = None
    return model.eval()


def packed(weight: NF4Weight, start: int, rows: int, dtype: torch.dtype) -> Any:
    """Rows of an NF4 weight as bitsandbytes holds them; copies, as some machines repack them."""
    import bitsandbytes.functional as bnb
    from bitsandbytes.nn import Params4bit

    part = slice(start, start + rows)
    state = bnb.QuantState(
        absmax=weight.absmax[part].flatten().clone(),
        shape=torch.Size((rows, weight.shape[1])),
        code=bnb.get_4bit_type("nf4", device=weight.codes.device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
    )
    return Params4bit(
        weight.codes[part].reshape(-1, 1).clone(),
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        quant_type="nf4",
        bnb_quantized=True,
    )


def with_adapters(model: Any, count: int, rank: int) -> Any:
    """PEFT's model with so many random adapters on all projections."""
    from peft import LoraConfig, PeftModel

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(PROJECTIONS), init_lora_weights=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel(model, config, adapter_name="a0", autocast_adapter_dtype=False)
        for i in range(1, count):
            peft.add_adapter(f"a{i}", config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for key, p in peft.named_parameters():
            if "lora_" in key:
                p.data = p.data.to(model.dtype).normal_(0, 0.01)
    return peft.eval()


@torch.inference_mode()
def logits_error(base: Base, model: Any, tokens: int = 32) -> float:
    """How far the two models' logits are apart, relative to ours."""
    decoder = base.decoder
    ids = torch.arange(4, 4 + tokens, device=decoder.device)
    hidden = decoder.hidden(ids, torch.arange(tokens, device=ids.device), DenseCausal(1, tokens))
    ours = decoder.logits(hidden)
    theirs = model(input_ids=ids[None]).logits[0].float()
    return float((theirs - ours).norm() / ours.norm())
