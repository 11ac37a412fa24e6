"""How much memory a run takes, by part, from the base's shape alone. Calculated, not measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mora_serve.model.footprint import CUDA_BYTES, NF4_BITS
from mora_serve.model.shape import ModelShape
from router_training.tuning.settings import TuneSettings, four_bit

DOUBLE_BITS = 4.127  # a weight in NF4 with double quantisation
# What a layer keeps of a token for the backward pass, as counted. Bytes times the hidden size, in
# 32 and in 16 bits alike: the norms' inputs are kept in 32 bits beside 16-bit copies of the
# adapters' inputs. And numbers times the other widths: k and v; gate, its SiLU, up, their product.
KEPT_HIDDEN_BYTES, KEPT_KV, KEPT_INTERMEDIATE = 24, 2, 4
# TRL computes logits in tiles of at most so many tokens and vocabulary entries; on CUDA one kernel
# works in place, on the CPU this many copies are there at once.
TILE_TOKENS, TILE_VOCABULARY, CPU_TILES = 4096, 32768, 8.25


@dataclass(frozen=True)
class Plan:
    """Bytes by part; ``fits`` is None where no card was given."""

    parts: Mapping[str, float]
    card: float | None = None

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool | None:
        """Whether the card has as much."""
        return None if self.card is None else self.total <= self.card


def plan(
    settings: TuneSettings, shape: ModelShape, *, cuda: bool = True, card: float | None = None
) -> Plan:
    """The parts of one device's memory at a step's peak; ``card`` in bytes.

    After the arithmetic of QLoRA (Dettmers et al. 2023, section 3 and appendix G): weights in NF4,
    all else in 16 bits, adapters and their gradients in 32, and what the backward pass needs.
    """
    s, h, inner = settings, shape.hidden_size, shape.intermediate_size
    rows, length = s.micro_batch_size, s.sequence_len
    # a preferred and a rejected answer go through together
    tokens = rows * length * (2 if s.rl not in (None, "kto") else 1)
    size = 2 if cuda else 4  # of activations: bf16 on cards, fp32 on CPUs
    tables, norms = shape.table_parameters, shape.norm_parameters
    trained = shape.adapter_parameters(s.lora_r, s.lora_target_modules)
    parts: dict[str, float] = {}
    if s.adapter == "full":
        whole = shape.linear_parameters + tables + norms
        parts["weights, fp32"] = 4 * whole
        trained = whole
    else:
        bits = (
            (DOUBLE_BITS if s.bnb_4bit_use_double_quant else NF4_BITS) if four_bit(s) else 8 * size
        )
        parts["linear weights"] = shape.linear_parameters * bits / 8
        parts["embedding, head, norms"] = (tables + norms) * size
        parts["adapter, fp32"] = 4 * trained
    parts["gradients, fp32"] = 4 * trained
    eight = s.optimizer in ("adamw_8bit", "paged_adamw_8bit") or (
        s.optimizer == "auto" and s.adapter == "qlora"
    )
    parts["optimiser"] = (0 if s.optimizer == "sgd" else 2 if eight else 8) * trained
    kv = shape.kv_heads * shape.head_dim
    wide = KEPT_KV * kv + KEPT_INTERMEDIATE * inner
    layer = tokens * (KEPT_HIDDEN_BYTES * h + wide * size)
    if s.gradient_checkpointing:
        parts["checkpoints, a layer's input each"] = tokens * h * size * shape.layers
        parts["one layer's activations"] = layer
    else:
        parts["activations of all layers"] = layer * shape.layers
    if four_bit(s):
        widest = max(a * b for a, b in map(shape.projection, s.lora_target_modules))
        parts["one dequantised matrix"] = widest * size
    tile = min(tokens, TILE_TOKENS) * min(shape.vocab_size, TILE_VOCABULARY) * size
    parts["logits, a tile"] = tile if cuda else CPU_TILES * tile
    if cuda:
        parts["CUDA itself, about"] = CUDA_BYTES
    return Plan(parts, card)


def cheaper(
    settings: TuneSettings, shape: ModelShape, card: float, *, cuda: bool = True
) -> tuple[str, Plan] | None:
    """The first change of those that cost little that makes the run fit, and its plan."""
    for said, changed in _changes(settings):
        found = plan(changed, shape, cuda=cuda, card=card)
        if found.fits:
            return said, found
    return None


def _changes(s: TuneSettings) -> Iterator[tuple[str, TuneSettings]]:
    """From the cheapest on, each with those before it."""
    said: list[str] = []

    def change(words: str, **values: object) -> tuple[str, TuneSettings]:
        nonlocal s
        s = dataclasses.replace(s, **values)  # type: ignore[arg-type]
        said.append(words)
        return "; ".join(said), s

    if s.adapter != "qlora":
        yield change("adapter: qlora", adapter="qlora", load_in_4bit=None)
    if not s.gradient_checkpointing:
        yield change("gradient_checkpointing: true", gradient_checkpointing=True)
    if not s.bnb_4bit_use_double_quant:
        yield change("bnb_4bit_use_double_quant: true", bnb_4bit_use_double_quant=True)
    rows, steps = s.micro_batch_size, s.gradient_accumulation_steps
    while rows > 1:
        rows, steps = rows // 2, steps * 2
        words = f"micro_batch_size: {rows} with gradient_accumulation_steps: {steps}"
        said = [w for w in said if not w.startswith("micro_batch_size")]
        yield change(words, micro_batch_size=rows, gradient_accumulation_steps=steps)
    length = s.sequence_len
    while length > 256:
        length //= 2
        said = [w for w in said if not w.startswith("sequence_len")]
        yield change(f"sequence_len: {length}", sequence_len=length)
