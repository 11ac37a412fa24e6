"""Tokens picked by the kernel against engine/sampler.py's, which shares no code with it.

That it compiles for cards is seen with the whole step, in tests/engine/test_cuda_forward.py.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_serve.core import SamplingParams
from mora_serve.engine.sampler import SamplingRow, sample, signed
from mora_serve.model.kernels.sampling import BLOCK, Pick


def pick(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    device = logits.device
    chosen = Pick(len(rows), logits.shape[1], device)
    chosen(
        logits,
        torch.tensor([r.params.temperature for r in rows], device=device),
        torch.tensor([signed(r.params.seed) for r in rows], device=device),
        torch.tensor([len(r.output) for r in rows], device=device, dtype=torch.int32),
    )
    return chosen.tokens.tolist()


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.3, 1.0, 2.5]),
            st.integers(-(1 << 63), (1 << 64) - 1),
            st.integers(0, 40),
        ),
        min_size=1,
        max_size=4,
    ),
    vocab=st.sampled_from([1, 31, BLOCK, 2 * BLOCK + 77]),
    half=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(max_examples=10)
def test_rows_get_the_sampler_s_tokens(
    device: torch.device,
    rows: list[tuple[float, int, int]],
    vocab: int,
    half: bool,
    seed: int,
) -> None:
    """Greedy and drawn, in any type of logits; ties go to the first."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), vocab, generator=generator).mul(3)
    logits = logits.bfloat16() if half else logits  # bfloat16 has ties
    wanted = [SamplingRow(SamplingParams(temperature=t, seed=s), (), [0] * n) for t, s, n in rows]
    want = [token.id for token in sample(logits.float(), wanted)]
    assert pick(logits.to(device), wanted) == want


def test_a_row_with_a_number_that_is_not_finite_has_no_token(device: torch.device) -> None:
    logits = torch.zeros(6, BLOCK + 5)
    for row, bad in enumerate((float("nan"), float("inf"), -float("inf")), 1):
        logits[row, BLOCK + row] = bad
    logits[5, 3] = 3e38  # its sum would not be finite
    logits[5, 4] = 2e38
    greedy = [SamplingRow(SamplingParams(), (), ())] * 6
    assert pick(logits.to(device), greedy) == [0, -1, -1, -1, 0, 3]
    hot = [SamplingRow(SamplingParams(temperature=1.0), (), ())] * 6
    assert [t == -1 for t in pick(logits.to(device), hot)] == [False, *[True] * 3, False, False]


def test_rows_of_a_wider_buffer_and_rows_left_over(device: torch.device) -> None:
    """Fewer rows than there is room for, with a stride of their own."""
    wide = torch.full((3, 100), 9.0)
    wide[:, 60:] = 99.0
    wide[1, 7] = 10.0
    chosen = Pick(3, 50, device)
    zeros = torch.zeros(2, device=device)
    chosen(wide[:2, :50].to(device), zeros, zeros.long(), zeros.int())
    assert chosen.tokens.tolist() == [0, 7, 0]
