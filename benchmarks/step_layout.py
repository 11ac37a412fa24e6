"""What the host does to lay out a decode step on a card: between two steps, and while one runs.

``DecodeRows`` alone, no model: the same sequences decode for a while, and some come to the end of a
page in each step. Two ways take turns: everything between two steps, and all that is known laid out
ahead. Medians of each call; the start of the copy to the device is part of what is between steps,
on a CPU it is the copy.

    python -m benchmarks.step_layout --json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import report
from mora_serve.core import Mixture, Request, SamplingParams
from mora_serve.engine.scheduler import Chunk
from mora_serve.engine.sequence import Sequence as Running
from mora_serve.engine.step_buffers import DecodeRows, StepBuffers

PAGE_SIZE, CONTEXT = 16, 8192
WARM_UP = 200  # steps


def main() -> None:
    """Measure, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000, help="of each way")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = measure(args.rows, args.steps, device)
    report.emit(
        {
            **seconds,
            "between_of_before": seconds["between_seconds"] / seconds["before_seconds"],
            "device": str(device),
            "arguments": vars(args),
            "environment": report.environment(),
        }
    )


def measure(count: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Medians: all of it between two steps; what is left there; what runs beside a step."""
    rows = DecodeRows(StepBuffers(count, count, CONTEXT // PAGE_SIZE, device), PAGE_SIZE)
    sequences = [running(i) for i in range(count)]
    slots: dict[str, int] = {}  # nobody has adapters: rows that stay are not asked for them
    took: dict[str, list[float]] = {"before": [], "between": [], "beside": []}
    for step in range(2 * steps + WARM_UP):
        batch = [Chunk(s, len(s.tokens) - 1, 1, True) for s in sequences]
        ahead = step // 100 % 2 == 0  # by turns
        started = time.perf_counter()
        rows.fill(batch, count, slots.__getitem__)
        filled = time.perf_counter()
        if ahead:
            rows.ahead()
        ended = time.perf_counter()
        if step >= WARM_UP and step % 100:  # the first of a turn was laid out in the other way
            took["between" if ahead else "before"].append(filled - started)
            if ahead:
                took["beside"].append(ended - filled)
        answer(sequences)
    return {f"{name}_seconds": statistics.median(each) for name, each in took.items()}


def running(number: int) -> Running:
    """A sequence that draws its tokens; those of a batch end their pages in different steps."""
    request = Request(f"r{number}", tuple(range(100 + number)), SamplingParams(), Mixture())
    sequence = Running(request, None)  # type: ignore[arg-type]  # no text comes of it
    sequence.pages = list(range(-(-len(sequence.tokens) // PAGE_SIZE)))
    return sequence


def answer(sequences: Sequence[Running]) -> None:
    """One token more for each, from the beginning where its context is full."""
    for sequence in sequences:
        if len(sequence.tokens) == CONTEXT:
            del sequence.tokens[sequence.prompt_length :]
        sequence.append(7)
        if len(sequence.tokens) > PAGE_SIZE * len(sequence.pages):
            sequence.pages.append(len(sequence.pages))


if __name__ == "__main__":
    main()
