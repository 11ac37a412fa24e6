"""The mixed low-rank layer in its trainable form: all adapters at once, each row its own mixture.

The formula is lora.py's. Rows that stand side by side with few adapters between them make a block,
and a block's products leave all other adapters out; sort the rows by mixture before they come.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mora_serve.model.shape import PROJECTIONS, SITES, ModelShape, projection_path

# A product of its own costs a block about as much as this many tokens with an adapter too many.
BLOCK_COST = 128


class StackedAdapters(nn.Module):
    """``count`` trainable adapters of one rank.

    Each has its own parameters, so that gradients of the adapters that a batch uses are all that
    is computed and added up: ``a["layer/site/index"]`` [projections * rank, in], one matrix, so
    that x is read once, and ``b["layer/site/index"]`` [rank, out], transposed. Projections that
    are no targets take no room in either. With ``layer_scales``, ``scales`` [count, layers] are
    factors of an adapter's weight in each layer, learned too, 1 at first; without, they are None.
    """

    def __init__(
        self,
        shape: ModelShape,
        count: int,
        rank: int,
        alpha: float,
        targets: Sequence[str] = PROJECTIONS,
        layer_scales: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.count, self.rank, self.alpha = shape, count, rank, alpha
        self.targets = tuple(targets)
        self.parts = {site: site_parts(shape, site, self.targets) for site in SITES}
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        self.scales = nn.Parameter(torch.ones(count, shape.layers)) if layer_scales else None
        for layer, (site, parts) in itertools.product(range(shape.layers), self.parts.items()):
            if not parts:
                continue
            columns = shape.projection(parts[0].name)[1]
            bound = 1 / math.sqrt(columns)  # PEFT's kaiming_uniform_(a=sqrt(5))
            for i in range(count):
                drawn = torch.empty(len(parts) * rank, columns).uniform_(-bound, bound)
                self.a[f"{layer}/{site}/{i}"] = nn.Parameter(drawn)
                self.b[f"{layer}/{site}/{i}"] = nn.Parameter(torch.zeros(rank, parts[-1].own.stop))

    def mix(self, weights: Tensor, length: int, support: Tensor | None = None) -> StackedMixture:
        """The adapters argument for [batch * length] tokens; weights [batch, count].

        ``support`` [batch, count] bool says which adapters a row goes through, so that a weight of
        0 has a gradient too where it is learned. Left out, they are those of other weights; of
        learned weights, all.
        """
        if support is not None:
            blocks = _blocks(support, length)
        elif weights.requires_grad:
            blocks = [Block(slice(0, len(weights) * length), tuple(range(self.count)))]
        else:
            blocks = _blocks(weights, length)
        owners = torch.zeros(len(weights), max(len(b.adapters) for b in blocks), dtype=torch.long)
        real = torch.zeros_like(owners, dtype=weights.dtype)
        for tokens, adapters in blocks:
            rows = slice(tokens.start // length, tokens.stop // length)
            owners[rows, : len(adapters)] = torch.tensor(adapters, dtype=torch.long)
            real[rows, : len(adapters)] = self.alpha / self.rank
        owners, real = owners.to(weights.device), real.to(weights.device)
        factors = weights.gather(1, owners) * real
        rows_of = torch.arange(len(weights), device=weights.device).repeat_interleave(length)
        return StackedMixture(self, Weighting(factors, owners, rows_of), blocks)

    def projection(self, layer: int, name: str, index: int) -> tuple[Tensor, Tensor]:
        """Views of one adapter's A [rank, in] and B [rank, out] of one projection.

        KeyError for a projection that is no target.
        """
        for site, parts in self.parts.items():
            for part in parts:
                if part.name == name:
                    key = f"{layer}/{site}/{index}"
                    rows = slice(part.place * self.rank, (part.place + 1) * self.rank)
                    return self.a[key][rows], self.b[key][:, part.own]
        raise KeyError(name)

    def export(self, index: int) -> dict[str, Tensor]:
        """One adapter under PEFT's key names, ready for adapter_model.safetensors."""
        out = {}
        for layer, name in itertools.product(range(self.shape.layers), self.targets):
            a, b = self.projection(layer, name, index)
            prefix = f"base_model.model.{projection_path(layer, name)}"
            out[f"{prefix}.lora_A.weight"] = a.detach().contiguous()
            out[f"{prefix}.lora_B.weight"] = b.detach().T.contiguous()
        return out


class Part(NamedTuple):
    """A targeted projection of a site.

    ``place`` counts the targeted ones; ``out`` are its columns of the site's output and ``own``
    those of the adapters' B.
    """

    name: str
    place: int
    out: slice
    own: slice


def site_parts(shape: ModelShape, site: str, targets: Sequence[str]) -> list[Part]:
    """The targeted projections of a site, in its order."""
    parts: list[Part] = []
    start = own = 0
    for name in SITES[site]:
        width = shape.projection(name)[0]
        if name in targets:
            out = slice(start, start + width)
            parts.append(Part(name, len(parts), out, slice(own, own + width)))
            own += width
        start += width
    return parts


class Block(NamedTuple):
    """Neighbouring tokens, and the adapters that at least one of them uses."""

    tokens: slice
    adapters: tuple[int, ...]


def _blocks(used: Tensor, length: int) -> list[Block]:
    """Cut rows of ``length`` tokens into blocks; ``used`` [rows, adapters] is not 0 where it is.

    Neighbours share a block where the products with adapters that a token does not use cost less
    than products apart.
    """
    blocks: list[Block] = []
    for row, uses in enumerate(used.ne(0).tolist()):
        own = tuple(i for i, yes in enumerate(uses) if yes)
        block = Block(slice(row * length, (row + 1) * length), own)
        while blocks and (joined := _joined(blocks[-1], block)):
            blocks.pop()
            block = joined
        blocks.append(block)
    return blocks


def _joined(first: Block, second: Block) -> Block | None:
    union = tuple(sorted({*first.adapters, *second.adapters}))
    both = Block(slice(first.tokens.start, second.tokens.stop), union)
    wasted = _products(both) - _products(first) - _products(second)
    # Tokens without adapters stay by themselves: their products are none at all.
    empty = not first.adapters or not second.adapters
    return both if (not union if empty else wasted < BLOCK_COST) else None


def _products(block: Block) -> int:
    start, stop = block.tokens.start, block.tokens.stop
    return len(range(start, stop)) * len(block.adapters)


class Run(NamedTuple):
    """Neighbouring blocks of as many tokens and adapters each, for batched products.

    ``start`` is the first one's first token, ``tokens`` are those of a block.
    """

    start: int
    tokens: int
    adapters: tuple[tuple[int, ...], ...]

    @property
    def span(self) -> slice:
        """The tokens of all blocks."""
        return slice(self.start, self.start + self.tokens * len(self.adapters))

    def of(self, x: Tensor) -> Tensor:
        """Its part of x [tokens, n], by block: [blocks, tokens of a block, n]."""
        return x[self.span].view(len(self.adapters), self.tokens, -1)


def _runs(blocks: Sequence[Block]) -> list[Run]:
    runs: list[Run] = []
    for tokens, adapters in blocks:
        own = Run(tokens.start, tokens.stop - tokens.start, (adapters,))
        last = runs[-1] if runs else None
        if (
            last
            and (last.span.stop, last.tokens) == (own.start, own.tokens)
            and len(last.adapters[0]) == len(adapters)
        ):
            runs[-1] = last._replace(adapters=(*last.adapters, adapters))
        else:
            runs.append(own)
    return runs


class Weighting(NamedTuple):
    """What each row's adapters are multiplied by.

    ``factors`` [rows, n]: weight times scaling, in the order of the adapters of the row's block;
    ``owners`` [rows, n] are these adapters; ``rows`` [tokens] is the row of each token.
    """

    factors: Tensor
    owners: Tensor
    rows: Tensor


class StackedMixture:
    """A StackedAdapters module with one batch's weights and blocks."""

    def __init__(
        self, adapters: StackedAdapters, weighting: Weighting, blocks: Sequence[Block]
    ) -> None:
        self.adapters, self.weighting = adapters, weighting
        self.blocks = [block for block in blocks if block.adapters]
        self.used = sorted({i for block in blocks for i in block.adapters})
        self._constant = None if adapters.scales is not None else self._spread(weighting.factors)

    def _spread(self, factors: Tensor) -> Tensor:
        """[rows, n] -> [tokens, n * rank]."""
        return factors.repeat_interleave(self.adapters.rank, dim=1)[self.weighting.rows]

    def _factors(self, layer: int) -> Tensor:
        if self._constant is not None:
            return self._constant
        scales = self.adapters.scales
        factors, owners, _ = self.weighting
        return self._spread(factors if scales is None else factors * scales[:, layer][owners])

    def at(self, tokens: Tensor) -> StackedMixture:
        """The same for some of the tokens [n], ascending."""
        ranges = [[block.tokens.start, block.tokens.stop] for block in self.blocks]
        found = torch.searchsorted(tokens, torch.tensor(ranges, device=tokens.device)).tolist()
        blocks = [
            Block(slice(start, stop), block.adapters)
            for (start, stop), block in zip(found, self.blocks, strict=True)
            if start < stop
        ]
        weighting = self.weighting._replace(rows=self.weighting.rows[tokens])
        return StackedMixture(self.adapters, weighting, blocks)

    def apply(self, layer: int, site: str, x: Tensor, y: Tensor) -> Tensor:
        """Add the mixture's delta to y in place, differentiably; see decoder.Adapters."""
        parts = self.adapters.parts[site]
        if not parts or not self.blocks:
            return y
        keys = [f"{layer}/{site}/{i}" for i in self.used]
        a, b = ([stack[key] for key in keys] for stack in (self.adapters.a, self.adapters.b))
        slots = {adapter: slot for slot, adapter in enumerate(self.used)}
        runs = _runs([Block(t, tuple(slots[i] for i in own)) for t, own in self.blocks])
        out: Tensor = _LowRank.apply(x, y, self._factors(layer), runs, parts, *a, *b)  # type: ignore[no-untyped-call]
        return out


class _LowRank(torch.autograd.Function):
    """y[:, p] += ((x @ a_p.T) * factors) @ b_p for the projections p of one site, run by run.

    With u adapters in a block, its inner products are [tokens, projections, u * rank].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        factors: Tensor,
        runs: Sequence[Run],
        parts: Sequence[Part],
        *stacks: Tensor,
    ) -> Tensor:
        inners = []
        for run in runs:
            own_a, own_b = _gather(stacks, run.adapters, len(parts))
            width = own_b.shape[1]
            inner = torch.bmm(run.of(x), own_a.mT)
            inner = inner.view(*inner.shape[:2], len(parts), width)
            mixed = inner * run.of(factors)[:, :, None, :width]
            of_y = run.of(y)
            for part in parts:
                of_y[:, :, part.out].baddbmm_(mixed[:, :, part.place], own_b[:, :, part.own])
            inners.append(inner)
        ctx.mark_dirty(y)
        ctx.runs, ctx.parts = runs, parts
        ctx.save_for_backward(x, factors, *stacks, *inners)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, factors, *saved = ctx.saved_tensors
        stacks, inners = saved[: -len(ctx.runs)], saved[-len(ctx.runs) :]
        grad = grad.contiguous()
        # A row of no block has no adapter: nothing comes back to its x from here.
        whole = sum(inner.shape[:2].numel() for inner in inners) == len(x)
        of_x = (torch.empty_like if whole else torch.zeros_like)(x)
        of_factors = torch.zeros_like(factors) if ctx.needs_input_grad[2] else None
        of_stacks: list[Tensor | None] = [None] * len(stacks)
        for run, inner in zip(ctx.runs, inners, strict=True):
            own_a, own_b = _gather(stacks, run.adapters, len(ctx.parts))
            weights = run.of(factors)[:, :, None, : own_b.shape[1]]
            through, of_b = torch.empty_like(inner), torch.empty_like(own_b)
            mixed, above = inner * weights, run.of(grad)
            for part in ctx.parts:
                own = above[:, :, part.out]
                torch.bmm(own, own_b[:, :, part.own].mT, out=through[:, :, part.place])
                torch.bmm(mixed[:, :, part.place].mT, own, out=of_b[:, :, part.own])
            if of_factors is not None:
                run.of(of_factors)[:, :, : own_b.shape[1]] = (through * inner).sum(2)
            flat = (through * weights).flatten(2)
            if ctx.needs_input_grad[0]:
                torch.bmm(flat, own_a, out=run.of(of_x))
            _scatter(of_stacks, run.adapters, len(ctx.parts), flat.mT @ run.of(x), of_b)
        return of_x, grad, of_factors, None, None, *of_stacks


def _gather(
    stacks: Sequence[Tensor], blocks: Sequence[Sequence[int]], parts: int
) -> tuple[Tensor, Tensor]:
    """A [blocks, parts * u * rank, in], by projection first, and B [blocks, u * rank, out].

    ``stacks`` holds the A of all adapters, then the B of all; each block has u of them.
    """
    count = len(stacks) // 2

    def of_a(adapters: Sequence[int]) -> Tensor:
        if len(adapters) == 1:
            return stacks[adapters[0]]
        by_part = zip(*(stacks[i].chunk(parts) for i in adapters), strict=True)
        return torch.cat([own for part in by_part for own in part])

    def of_b(adapters: Sequence[int]) -> Tensor:
        own = [stacks[count + i] for i in adapters]
        return own[0] if len(own) == 1 else torch.cat(own)

    a, b = ([pick(own) for own in blocks] for pick in (of_a, of_b))
    return (a[0][None], b[0][None]) if len(blocks) == 1 else (torch.stack(a), torch.stack(b))


def _scatter(
    stacks: list[Tensor | None],
    blocks: Sequence[Sequence[int]],
    parts: int,
    of_a: Tensor,
    of_b: Tensor,
) -> None:
    """Add to ``stacks`` what comes back to the results of ``_gather``; None stands for zeros."""
    count = len(stacks) // 2
    for adapters, whole_a, whole_b in zip(blocks, of_a, of_b, strict=True):
        used = len(adapters)
        pieces = whole_a.chunk(parts * used)
        for place, (i, b) in enumerate(zip(adapters, whole_b.chunk(used), strict=True)):
            a = whole_a if used == 1 else torch.cat(pieces[place::used])
            for slot, value in ((i, a), (count + i, b)):
                before = stacks[slot]
                stacks[slot] = value if before is None else before + value
