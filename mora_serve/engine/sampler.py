"""From logits to tokens: penalties, temperature, filters, and noise that only the seed fixes.

Every operation works within one row, so a row's token is the same whatever else is in the
batch. Randomness is Gumbel-max: the noise of a token depends on (seed, position, token id)
alone, by a counter-based generator, so filters and other rows shift nothing.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mora_serve.core import Logprob, SamplingParams, TokenOut

GREEDY_BELOW = 1e-5  # a temperature under which dividing by it only loses digits
_CACHED, _LARGE = 1 << 15, 1 << 24  # elements of noise made at a time
_HEAD = 1024  # scores among which a nucleus is looked for before a whole row is sorted
_GAMMA = -0x61C8864680B583EB  # SplitMix64's constants as signed 64-bit numbers
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What one row of logits is sampled with; the position is the length of ``output``."""

    params: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]


def takes_best(params: SamplingParams) -> bool:
    """Whether the token is simply the one with the greatest logit, and nothing else is asked."""
    return (
        params.temperature < GREEDY_BELOW
        and params.repetition_penalty == 1.0
        and not params.presence_penalty
        and not params.frequency_penalty
        and params.logprobs is None
    )


def draws_plainly(params: SamplingParams) -> bool:
    """Whether the token is drawn from all of the vocabulary at the temperature, and that is all."""
    return (
        params.temperature >= GREEDY_BELOW
        and params.repetition_penalty == 1.0
        and not params.presence_penalty
        and not params.frequency_penalty
        and params.logprobs is None
        and not _filtered(params)
    )


def is_finite(logits: Tensor) -> Tensor:
    """Whether each row of ``logits`` [n, V] has only finite numbers: bool [n]."""
    low, high = torch.aminmax(logits, dim=-1)
    return torch.isfinite(low) & torch.isfinite(high)


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[TokenOut]:
    """One token for each row of ``logits`` [n, V] float32, which is left unchanged.

    In the order of transformers and vLLM: penalties, temperature, top-k, top-p, min-p, noise.
    Log-probabilities are those of the raw logits.
    """
    if not rows:
        return []
    scores = _penalise(logits, rows)
    chosen = scores.argmax(-1)
    noisy = [i for i, row in enumerate(rows) if row.params.temperature >= GREEDY_BELOW]
    if noisy:
        index = torch.tensor(noisy, device=logits.device)
        chosen[index] = _draw(scores[index], [rows[i] for i in noisy])
    tokens: list[int] = chosen.tolist()
    logprobs = _logprobs(logits, rows, tokens)
    return [logprobs.get(i, TokenOut(token)) for i, token in enumerate(tokens)]


def _penalise(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    scores = logits
    for i, row in enumerate(rows):
        p = row.params
        if p.repetition_penalty == 1.0 and not (
            row.output and (p.presence_penalty or p.frequency_penalty)
        ):
            continue
        if scores is logits:
            scores = logits.clone()
        line = scores[i]
        if p.repetition_penalty != 1.0:
            seen = torch.tensor(sorted({*row.prompt, *row.output}), device=line.device)
            if len(seen):
                old = line[seen]
                line[seen] = torch.where(
                    old < 0, old * p.repetition_penalty, old / p.repetition_penalty
                )
        if row.output and (p.presence_penalty or p.frequency_penalty):
            counts = Counter(row.output)
            ids = torch.tensor(list(counts), device=line.device)
            times = torch.tensor(list(counts.values()), device=line.device, dtype=line.dtype)
            line[ids] -= p.frequency_penalty * times + p.presence_penalty
    return scores


def _draw(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Token ids [m] for rows [m, V] that are not greedy."""
    device = scores.device
    temperature = [row.params.temperature for row in rows]
    scores = scores / torch.tensor(temperature, device=device, dtype=scores.dtype)[:, None]
    state = torch.tensor(
        [signed(row.params.seed) for row in rows], device=device, dtype=torch.int64
    )
    position = torch.tensor([len(row.output) for row in rows], device=device)
    state = _mix(_mix(state) + _GAMMA * (position + 1))
    out = torch.empty(len(rows), device=device, dtype=torch.int64)

    plain = [i for i, row in enumerate(rows) if not _filtered(row.params)]
    ids = torch.arange(scores.shape[-1], device=device)
    size = max(1, (_CACHED if device.type == "cpu" else _LARGE) // len(ids))
    for start in range(0, len(plain), size):
        index = torch.tensor(plain[start : start + size], device=device)
        noise = _gumbel(state[index][:, None], ids)
        out[index] = (scores[index].double() + noise).argmax(-1)
    kept = [i for i, row in enumerate(rows) if _filtered(row.params)]
    if kept:
        index = torch.tensor(kept, device=device)
        part = scores[index]
        threshold = _threshold(part, [rows[i].params for i in kept])
        passed = part >= threshold[:, None]
        line, token = passed.nonzero(as_tuple=True)
        value = part[line, token].double() + _gumbel(state[index][line], token)
        sizes: list[int] = passed.sum(-1).tolist()
        for i, v, t in zip(kept, torch.split(value, sizes), torch.split(token, sizes), strict=True):
            out[i] = t[v.argmax()] if len(v) else 0  # nothing passes when the row is NaN
    return out


def _filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _threshold(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The lowest score [m] that top-k, top-p and min-p, in this order, let through.

    Rows are taken together only with rows of the same k: the length of a sum fixes its rounding.
    Tokens that tie with the last one let through are let through as well.
    """
    vocab = scores.shape[-1]
    lowest = torch.full(scores.shape[:1], -torch.inf, device=scores.device, dtype=scores.dtype)
    by_k = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0]
    for k, members in _groups(by_k, lambda i: min(params[i].top_k or vocab, vocab)):
        index = torch.tensor(members, device=scores.device)
        limit = torch.tensor(
            [params[i].top_p for i in members], device=scores.device, dtype=torch.float64
        )
        lowest[index] = _nucleus(scores[index], k, limit)
    for i, p in enumerate(params):
        if p.min_p > 0.0:
            edge = scores[i].max().double() + math.log(p.min_p)
            lowest[i] = torch.maximum(lowest[i], edge.to(scores.dtype))
    return lowest


def _nucleus(scores: Tensor, k: int, limit: Tensor) -> Tensor:
    """The lowest score [m] among the ``k`` best of each row [m, V] that ``limit`` [m] leaves."""
    vocab = scores.shape[-1]
    top = scores.topk(min(k, _HEAD)).values
    best = top[:, :1]
    if k > _HEAD:
        mass = (scores - best).double().exp()
        if k < vocab:
            kth = scores.kthvalue(vocab - k + 1).values[:, None]
            mass *= scores >= kth
        total = mass.sum(-1)
        reached = (top - best).double().exp().sum(-1) >= limit * total
        if not bool(reached.all()):  # some need more than the head: whole rows, slower
            rest = (~reached).nonzero()[:, 0]
            whole = _descending(scores[rest])
            least = torch.empty_like(top[:, 0])
            least[rest] = _cut(whole[:, :k], total[rest], limit[rest])
            most = reached.nonzero()[:, 0]
            least[most] = _cut(top[most], total[most], limit[most])
            return least
    else:
        last = top[:, -1:]
        weight = (top - best).double().exp()
        # What ties with the k-th best passes too, so its probability counts.
        ties = (scores == last).sum(-1) - (top == last).sum(-1)
        total = weight.sum(-1) + ties * weight[:, -1]
    return _cut(top, total, limit)


def _descending(scores: Tensor) -> Tensor:
    if scores.device.type != "cpu":
        return scores.sort(descending=True).values
    ascending = np.sort(scores.numpy())  # vectorised, many times faster than torch's on a CPU
    return torch.from_numpy(ascending[:, ::-1].copy())


def _cut(top: Tensor, total: Tensor, limit: Tensor) -> Tensor:
    """The last of the descending scores [m, n] before which less than ``limit`` has passed."""
    weight = (top - top[:, :1]).double().exp()
    before = weight.cumsum(-1) - weight
    within = (before < (limit * total)[:, None]) | (limit >= 1.0)[:, None]
    within[:, 0] = True
    return top.gather(-1, within.sum(-1, keepdim=True) - 1)[:, 0]


def signed(seed: int) -> int:
    """The low 64 bits of a seed as a signed number."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of 64-bit numbers."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function on int64, wrapping."""
    x = _shift(x, 30).bitwise_xor_(x).mul_(_MIX_1)
    x = _shift(x, 27).bitwise_xor_(x).mul_(_MIX_2)
    return _shift(x, 31).bitwise_xor_(x)


def _gumbel(state: Tensor, token: Tensor) -> Tensor:
    """Standard Gumbel noise, float64: element ``token`` of the SplitMix64 stream at ``state``."""
    bits = _shift(_mix(state + _GAMMA * (token + 1)), 12)
    uniform = bits.double().add_(0.5).mul_(2.0**-52)  # exact; never 0, never 1
    return uniform.log_().neg_().log_().neg_()


def _logprobs(
    logits: Tensor, rows: Sequence[SamplingRow], tokens: Sequence[int]
) -> dict[int, TokenOut]:
    out: dict[int, TokenOut] = {}
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    for count, members in _groups(
        wanted, lambda i: min(rows[i].params.logprobs or 0, logits.shape[-1])
    ):
        index = torch.tensor(members, device=logits.device)
        logprobs = logits[index].float().log_softmax(-1)
        picked = torch.tensor([tokens[i] for i in members], device=logits.device)
        own: list[float] = logprobs.gather(-1, picked[:, None])[:, 0].tolist()
        top = logprobs.topk(count)
        for i, value, ids, values in zip(
            members, own, top.indices.tolist(), top.values.tolist(), strict=True
        ):
            out[i] = TokenOut(tokens[i], value, tuple(map(Logprob, ids, values)))
    return out


def _groups(members: list[int], key: Callable[[int], int]) -> list[tuple[int, list[int]]]:
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for i in members:
        groups[key(i)].append(i)
    return list(groups.items())
