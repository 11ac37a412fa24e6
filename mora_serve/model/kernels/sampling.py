"""Tokens from logits on the device: the greatest score of each row, with or without noise.

The torch reference is engine/sampler.py. Its noise is Gumbel-max by SplitMix64 from (seed,
position, token id); here the same numbers are made where the logits are read, in one pass, and a
row with a number that is not finite is found in the same pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # elements of the vocabulary a program


class Pick:
    """Scratch for ``rows`` rows of logits, and where their tokens land: ``tokens`` int32 [rows]."""

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        self._blocks = triton.cdiv(vocab, BLOCK)
        shape = (rows, self._blocks)
        self._best = torch.empty(shape, dtype=torch.float64, device=device)
        self._index = torch.empty(shape, dtype=torch.int32, device=device)
        self._bad = torch.empty(shape, dtype=torch.int32, device=device)
        self.tokens = torch.zeros(rows, dtype=torch.int32, device=device)

    def __call__(
        self, logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor
    ) -> None:
        """Token of each row of ``logits`` [n, vocabulary]; -1 where a number is not finite.

        ``temperatures`` float32 [n], 0 for the greatest logit itself; ``seeds`` int64 [n];
        ``positions`` int32 [n], of the tokens in their answers. Equal scores: the first.
        """
        rows, vocab = logits.shape
        scratch = self._best, self._index, self._bad
        _pick_in_block[(rows, self._blocks)](
            logits,
            *(temperatures, seeds, positions, *scratch, vocab, logits.stride(0)),
            BLOCKS=self._blocks,
            BLOCK=BLOCK,
        )
        _pick_of_blocks[(rows,)](
            *scratch, self.tokens, BLOCKS=self._blocks, PADDED=triton.next_power_of_2(self._blocks)
        )


@triton.jit
def _mix(x):
    """SplitMix64's output function; x is uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _pick_in_block(
    logits,
    temperatures,
    seeds,
    positions,
    best_out,
    index_out,
    bad_out,
    vocab,
    stride,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    block = tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    x = tl.load(logits + row.to(tl.int64) * stride + token, mask=inside, other=0.0).to(tl.float32)
    bad = tl.max(((x - x) != 0.0).to(tl.int32), axis=0)
    temperature = tl.load(temperatures + row)
    score = x.to(tl.float64)
    if temperature > 0.0:
        golden = tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
        state = _mix(tl.load(seeds + row).to(tl.uint64))
        state = _mix(state + golden * (tl.load(positions + row) + 1).to(tl.uint64))
        bits = _mix(state + golden * (token + 1).to(tl.uint64)) >> 12
        uniform = (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16  # 2**-52: never 0, never 1
        score = tl.div_rn(x, temperature).to(tl.float64) - tl.log(-tl.log(uniform))
    score = tl.where(inside, score, float("-inf"))
    best = tl.max(score, axis=0)
    out = row * BLOCKS + block
    tl.store(best_out + out, best)
    tl.store(index_out + out, tl.min(tl.where(score == best, token, vocab), axis=0))
    tl.store(bad_out + out, bad)


@triton.jit
def _pick_of_blocks(
    best_in, index_in, bad_in, tokens_out, BLOCKS: tl.constexpr, PADDED: tl.constexpr
):
    row = tl.program_id(0)
    block = tl.arange(0, PADDED)
    inside = block < BLOCKS
    at = row * BLOCKS + block
    best = tl.load(best_in + at, mask=inside, other=float("-inf"))
    index = tl.load(index_in + at, mask=inside, other=2147483647)
    bad = tl.max(tl.load(bad_in + at, mask=inside, other=0), axis=0)
    token = tl.min(tl.where(best == tl.max(best, axis=0), index, 2147483647), axis=0)
    tl.store(tokens_out + row, tl.where(bad > 0, -1, token))
