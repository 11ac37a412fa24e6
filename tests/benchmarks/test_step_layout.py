"""What laying out a decode step costs the host, on the server's own rows."""

from __future__ import annotations

import torch

from benchmarks.step_layout import CONTEXT, PAGE_SIZE, answer, measure, running


def test_both_ways_are_timed_over_ends_of_pages_and_of_contexts() -> None:
    sequences = [running(i) for i in range(3)]
    sequences[0].tokens += [7] * (CONTEXT - len(sequences[0].tokens))
    sequences[0].pages = list(range(CONTEXT // PAGE_SIZE))
    for _ in range(2 * PAGE_SIZE):
        answer(sequences)
    assert len(sequences[0].tokens) == sequences[0].prompt_length + 2 * PAGE_SIZE
    assert len(sequences[1].pages) == -(-len(sequences[1].tokens) // PAGE_SIZE)
    found = measure(3, 200, torch.device("cpu"))
    assert set(found) == {"before_seconds", "between_seconds", "beside_seconds"}
    assert all(seconds > 0 for seconds in found.values())
