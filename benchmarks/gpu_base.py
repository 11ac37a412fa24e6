"""A base of random 4-bit weights made where it runs, and adapters for it: nothing is downloaded.

What a step costs does not depend on the values, so they only have to keep activations finite.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks import families
from benchmarks.local import LocalEngine
from benchmarks.many_adapters import Template
from mora_serve.adapters.validate import read_upload
from mora_serve.model.decoder import Decoder, Layer
from mora_serve.model.footprint import BLOCK
from mora_serve.model.group_quant import GroupWeight
from mora_serve.model.loading import Base, rope_frequencies
from mora_serve.model.quant import DenseWeight, Linear, NF4Weight
from mora_serve.model.shape import PROJECTIONS, SITES, ModelShape
from mora_serve.model.tokenizer import Tokenizer

SPREAD = 0.02  # of a weight
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Llama-3.1-8B
LLAMA = ModelShape("llama", 128256, 4096, 14336, 32, 32, 8, 128, 131072, 1e-5, rope=ROPE)
# The same in small, for machines without a card
TINY = ModelShape("llama", 320, 64, 64, 1, 2, 1, 32, 16384, 1e-5, rope=ROPE)


def random_nf4(rows: int, columns: int, device: torch.device) -> NF4Weight:
    """A matrix of codes drawn evenly."""
    codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device=device)
    # codes drawn evenly are 0.6 of absmax in the root mean square
    absmax = torch.rand(rows, columns // BLOCK, device=device).add_(0.5).mul_(SPREAD / 0.6)
    return NF4Weight(codes, absmax)


def random_groups(
    rows: int, columns: int, device: torch.device, group: int = 128, ordered: bool = False
) -> GroupWeight:
    """One as GPTQ and AWQ have it, with zeros; ``ordered``: its inputs in an order of their own."""
    size = rows, -(-columns // group)
    codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device=device)
    # codes drawn evenly are 4.6 in the root mean square
    scales = torch.rand(size, device=device).add_(0.5).mul_(SPREAD / 4.6).half().float()
    zeros = torch.full(size, 7, dtype=torch.uint8, device=device)
    order = torch.randperm(columns, device=device) if ordered else None
    return GroupWeight(codes, scales, zeros, group, order)


def random_decoder(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> Decoder:
    """NF4 codes drawn evenly, embedding and head in ``dtype``."""
    torch.manual_seed(0)
    ones = torch.ones(shape.hidden_size, dtype=dtype, device=device)

    def table() -> DenseWeight:
        size = (shape.vocab_size, shape.hidden_size)
        return DenseWeight(torch.randn(size, dtype=dtype, device=device).mul_(SPREAD))

    layers = []
    for _ in range(shape.layers):
        sites = {}
        for site, names in SITES.items():
            sizes = [shape.projection(name) for name in names]
            weight = random_nf4(sum(rows for rows, _ in sizes), sizes[0][1], device)
            sites[site] = Linear((weight,))
        layers.append(Layer(ones, ones, sites))
    return Decoder(shape, table(), layers, ones, table(), *rope_frequencies(shape))


def random_base(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> Base:
    """A random decoder; the tokenizer is one of bytes."""
    decoder = random_decoder(shape, device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        families.byte_tokenizer(Path(folder))
        tokenizer = Tokenizer.load(Path(folder), frozenset({1}))
    return Base("random", shape, decoder, tokenizer, "", "nf4")


def add_adapters(local: LocalEngine, count: int, rank: int, prefix: str = "a") -> list[str]:
    """Give an engine so many different adapters on all projections; their names."""
    shape, limits = local.base.shape, local.config.adapters
    template = Template(shape, rank, PROJECTIONS)
    names = [f"{prefix}{i}" for i in range(count)]
    for seed, name in enumerate(names, len(local.adapters)):
        weights = template.weights(seed)
        local.add(name, read_upload(template.config, weights, None, shape, limits))
    return names
