"""The check for machines with a card, where there is none."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_check


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what to do without a card")
def test_without_a_card_it_says_so_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 2
    shown = capsys.readouterr()
    assert "no CUDA device" in shown.err
    assert shown.out == ""
