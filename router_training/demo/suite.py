"""The demo world as a suite of prompts to measure with."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

from mora_serve.errors import InvalidArgument
from router_training.demo.near_domain import near_domain
from router_training.demo.out_of_domain import out_of_domain
from router_training.demo.pairs import (
    HELD_OUT_PAIRS,
    TRAINED_PAIRS,
    Pair,
    pair_examples,
    three_way_examples,
)
from router_training.demo.reworded import reworded_examples
from router_training.demo.tasks import KNOWN, OPERATIONS, STYLES, TASKS, Split
from router_training.evaluation.cases import Case, FittingData, PairCases, Suite
from router_training.evaluation.held_out import CARD_PROMPTS

FRESH_SEED = 1_000_000  # no fitting draws from this seed or a greater one
OUTSIDE = 8  # prompts of nobody for each prompt a task


def demo_suite(seed: int = FRESH_SEED, prompts: int = 48) -> Suite:
    """``prompts`` fresh prompts a task, pair and kind, the same for the same arguments.

    Of reworded prompts there are as many for each task, of three-way mixes (an operation, a style
    and another style around both) about ``prompts`` an operation.

    Raises InvalidArgument for a seed below ``FRESH_SEED``: models may be fitted on its prompts.
    """
    if seed < FRESH_SEED:
        raise InvalidArgument(
            f"seed: {seed} is among the seeds that models are fitted with; give {FRESH_SEED} or "
            "more",
            field="seed",
        )
    tasks = tuple(TASKS)
    return Suite(
        prompts=prompts,
        seed=seed,
        trained_templates=_single(tasks, seed, prompts, "train"),
        kept_templates=_single(tasks, seed, prompts, "test"),
        reworded=_reworded(tasks, seed, prompts, least=0.5),
        new_words=_reworded(tasks, seed, prompts, most=0.499),
        pairs=_pairs(seed, prompts, "train"),
        pairs_kept=_pairs(seed, prompts, "test"),
        three_way=_three_way(seed, -(-prompts // 6)),
        near=_outside(near_domain, seed, prompts * OUTSIDE),
        far=_outside(out_of_domain, seed, prompts * OUTSIDE),
    )


def fitting_data(names: Sequence[str] = KNOWN, seed: int = 0, prompts: int = 120) -> FittingData:
    """What the demo's router is fitted on: prompts in the training's templates, and of no task.

    Of a task its card's and ``prompts`` others, of a pair that is trained a quarter of that, of no
    task four times that, near and far.
    """
    near, far = random.Random(f"near/{seed}"), random.Random(f"router/{seed}")
    few = -(-prompts // 4)

    def examples(name: str) -> list[tuple[str, str]]:
        task = TASKS[name]
        return [*task.examples(seed, CARD_PROMPTS), *task.examples(seed + 1, prompts)]

    return FittingData(
        examples={name: [Case(p, (name,), a) for p, a in examples(name)] for name in names},
        pairs=[
            case
            for case in _pair_cases(TRAINED_PAIRS, seed + 1, few, "train")
            if set(case.adapters) <= set(names)
        ],
        near=[near_domain(near, "train") for _ in range(4 * prompts)],
        far=[out_of_domain(far, "train") for _ in range(4 * prompts)],
        groups={name: TASKS[name].group for name in names},
    )


def _three_way(seed: int, count: int) -> list[Case]:
    return [
        Case(prompt, (operation, inner, outer), answer)
        for operation in OPERATIONS
        for inner, outer in itertools.permutations(STYLES, 2)
        for prompt, answer in three_way_examples(Pair(operation, inner), outer, seed, count)
    ]


def _single(tasks: Sequence[str], seed: int, count: int, templates: Split) -> list[Case]:
    return [Case(p, (n,), a) for n in tasks for p, a in TASKS[n].examples(seed, count, templates)]


def _reworded(
    tasks: Sequence[str], seed: int, count: int, least: float = 0.0, most: float = 1.0
) -> list[Case]:
    return [
        Case(p, (n,), a)
        for n in tasks
        for p, a in reworded_examples(n, seed, count, least=least, most=most)
    ]


def _pairs(seed: int, count: int, templates: Split) -> PairCases:
    return PairCases(
        _pair_cases(TRAINED_PAIRS, seed, count, templates),
        _pair_cases(HELD_OUT_PAIRS, seed, count, templates),
    )


def _pair_cases(pairs: Sequence[Pair], seed: int, count: int, templates: Split) -> list[Case]:
    return [
        Case(p, tuple(q), a) for q in pairs for p, a in pair_examples(q, seed, count, templates)
    ]


def _outside(draw: Callable[[random.Random, Split], str], seed: int, count: int) -> list[Case]:
    rng = random.Random(f"evaluate/{seed}")
    return [Case(draw(rng, "test")) for _ in range(count)]
