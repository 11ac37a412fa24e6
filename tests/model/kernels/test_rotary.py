"""Rotation, q/k norm, bias and KV write in one launch, against torch op by op."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from mora_serve.model.kernels.rotary import Rotary
from tests.model.kernels.compare import DTYPES, assert_close, same_bits

PAGES, PAGE = 7, 4


@dataclass
class Case:
    heads: int
    kv_heads: int
    dim: int
    biased: bool = False
    normed: bool = False


CASES = [
    Case(4, 4, 16),
    Case(6, 2, 20, biased=True),
    Case(7, 1, 32, normed=True),
    Case(8, 2, 128, biased=True, normed=True),
    Case(1, 1, 2),
]


def make(case: Case, dtype: torch.dtype, device: torch.device, tokens: int = 5):
    g = torch.Generator().manual_seed(case.heads * case.dim)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    width = (case.heads + 2 * case.kv_heads) * case.dim
    angles = 10 * torch.rand(30, case.dim // 2, generator=g).repeat(1, 2)
    rotary = Rotary(
        case.heads,
        case.kv_heads,
        angles.cos().to(device, dtype),
        angles.sin().to(device, dtype),
        bias=random(width) if case.biased else None,
        q_norm=random(case.dim) if case.normed else None,
        k_norm=random(case.dim) if case.normed else None,
        eps=1e-6,
    )
    places = torch.randperm(PAGES * PAGE - PAGE, generator=g)[:tokens] + PAGE
    places[tokens // 2] = -1
    positions = torch.randint(0, 30, (tokens,), generator=g)
    return rotary, (random(tokens, width), positions.to(device), places.to(device))


def run(function, case: Case, given, layers: int = 1):
    """Queries, keys and values; of several layers the last is written."""
    qkv = given[0]
    q = torch.full((len(qkv), case.heads, case.dim), 9.0).to(qkv)
    shape = (layers, case.kv_heads, PAGES, PAGE, case.dim)
    keys, values = (torch.zeros(shape).to(qkv) for _ in range(2))
    function(*given, q, keys[-1], values[-1])
    return q, keys, values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_queries_keys_and_values_are_torch_s(case, dtype, device):
    rotary, given = make(case, dtype, device)
    got, expected = run(rotary, case, given), run(rotary.reference, case, given)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_product_is_rounded_as_torch_rounds_it(dtype, device):
    """Hardly a bit differs."""
    rotary, given = make(CASES[3], dtype, device)
    got, expected = run(rotary, CASES[3], given), run(rotary.reference, CASES[3], given)
    for a, b in zip(got, expected, strict=True):
        assert (a != b).float().mean() < 0.001


def test_only_the_layer_s_own_places_are_written(device):
    """Neither page 0 nor another layer, and nothing for the token whose place is -1."""
    case = CASES[1]
    rotary, (qkv, positions, places) = make(case, torch.float32, device)
    _, keys, values = run(rotary, case, (qkv, positions, places), layers=2)
    for pages in (keys, values):
        assert not pages[0].any()
        written = pages[1].flatten(1, 2).abs().sum((0, 2)).nonzero().flatten()
        assert written.tolist() == sorted(p for p in places.tolist() if p >= 0)


def test_a_place_may_be_int32(device):
    case = CASES[0]
    rotary, (qkv, positions, places) = make(case, torch.float32, device)
    wide = run(rotary, case, (qkv, positions, places))
    narrow = run(rotary, case, (qkv, positions.int(), places.int()))
    assert all(same_bits(a, b) for a, b in zip(wide, narrow, strict=True))


def test_a_token_of_nan_harms_no_other_token(device):
    case = CASES[3]
    rotary, given = make(case, torch.float32, device)
    sound = run(rotary, case, given)
    given[0][1] = float("nan")
    q, keys, _ = run(rotary, case, given)
    assert q[1].isnan().all()
    others = [0, 2, 3, 4]
    assert same_bits(q[others], sound[0][others])
    place = int(given[2][1])
    keys.flatten(2, 3)[:, :, place] = sound[1].flatten(2, 3)[:, :, place]
    assert same_bits(keys, sound[1])


@pytest.mark.gpu
def test_the_size_of_a_large_model(device):
    case = Case(32, 8, 128, normed=True)
    rotary, given = make(case, torch.bfloat16, device, tokens=20)
    got, expected = run(rotary, case, given), run(rotary.reference, case, given)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)
