"""How well adapters compose: exact match of single tasks, of pairs, and of what they have to beat.

Teacher-forced: a row counts when every token of its answer is the most likely one given those
before it, which is when greedy generation gives the whole answer.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mora_serve.model.decoder import Decoder
from mora_serve.model.stacked import StackedAdapters
from router_training.batched import MixedRow, batch_hidden, mixture_weights
from router_training.batches import chunks, collate
from router_training.demo.base import tokens
from router_training.demo.coded import Row
from router_training.demo.pairs import (
    HELD_OUT_PAIRS,
    TRAINED_PAIRS,
    Pair,
    pair_examples,
    three_way_examples,
)
from router_training.demo.tasks import OPERATIONS, STYLES, TASKS, Split

Mixture = tuple[tuple[int, float], ...]
WRONG_WEIGHT = 0.3  # of a wrong adapter beside the right one
COLUMNS = (
    "single_mean",
    "pairs_trained_mean",
    "pairs_held_out_mean",
    "pairs_least",
    "best_single",
    "beside_wrong_kept",
    "three_way",
)
"""The figures of ``Composition.measure`` that ways to train are compared by."""
_NAMES = tuple(TASKS)
_INDEX = {name: i for i, name in enumerate(_NAMES)}


@torch.no_grad()
def exact_matches(
    decoder: Decoder, adapters: StackedAdapters, rows: Sequence[MixedRow]
) -> list[bool]:
    """Whether each row's answer is given whole (teacher-forced), in the order of the rows."""
    found = [False] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    for part in chunks(by_length, 64):
        some = [rows[i] for i in part]
        batch = collate([row.tokens for row in some])
        weights = mixture_weights(some, adapters.count)
        hidden = batch_hidden(decoder, batch, adapters, weights)
        logits = decoder.logits(hidden).view(*batch.targets.shape, -1)
        for i, right in zip(part, batch.right(logits).tolist(), strict=True):
            found[i] = right
    return found


@dataclass(frozen=True)
class Composition:
    """Measures one set of adapters, in the order of ``TASKS``, on ``prompts`` prompts a cell.

    ``always`` is part of every mixture.
    """

    decoder: Decoder
    adapters: StackedAdapters
    seed: int
    prompts: int = 32
    always: Mixture = ()

    def measure(self) -> dict[str, Any]:
        """Exact match by task and pair, and means.

        ``best_single`` is, for each held-out pair, that of its better adapter alone;
        ``uniform`` mixes all adapters at 1/n, ``random_pair`` an operation and a style other
        than the right ones. ``beside_wrong`` is the single tasks' with a wrong adapter at 0.3.
        ``three_way`` has a second style beside a pair, asked for after the first.
        """
        singles = self._singles("train", lambda i: ((i, 1.0),))
        trained, held = self._pairs(TRAINED_PAIRS, _both), self._pairs(HELD_OUT_PAIRS, _both)
        rng = random.Random(f"mixtures/{self.seed}")
        alone = [self._pairs(HELD_OUT_PAIRS, _one(part)) for part in (0, 1)]
        uniform = tuple((i, 1 / len(_NAMES)) for i in range(len(_NAMES)))
        beside = self._singles("train", lambda i: ((i, 1.0), (_other(rng, i), WRONG_WEIGHT)))
        every = {**trained, **held}
        return {
            "singles": singles,
            "pairs_trained": trained,
            "pairs_held_out": held,
            "single_mean": _mean(singles),
            "single_least": min(singles.values()),
            "single_new_templates": _mean(self._singles("test", lambda i: ((i, 1.0),))),
            "pairs_trained_mean": _mean(trained),
            "pairs_held_out_mean": _mean(held),
            "pairs_least": min(every.values()),
            "least_pair": min(every, key=lambda name: every[name]),
            "pairs_held_out_new_templates": _mean(self._pairs(HELD_OUT_PAIRS, _both, "test")),
            "best_single": _mean({n: max(a[n] for a in alone) for n in held}),
            "uniform": _mean(self._pairs(HELD_OUT_PAIRS, lambda pair: uniform)),
            "random_pair": _mean(self._pairs(HELD_OUT_PAIRS, lambda pair: _wrong(rng, pair))),
            "beside_wrong": _mean(beside),
            "beside_wrong_kept": _mean(beside) / max(_mean(singles), 1e-9),
            "three_way": _mean(self._three()),
        }

    def _singles(self, templates: Split, mixture: Callable[[int], Mixture]) -> dict[str, float]:
        rows = []
        for i, name in enumerate(_NAMES):
            examples = TASKS[name].examples(self.seed, self.prompts, templates)
            rows += [MixedRow(tokens(Row(*example)), mixture(i)) for example in examples]
        return dict(zip(_NAMES, self._shares(rows), strict=True))

    def _pairs(
        self, pairs: Sequence[Pair], mixture: Callable[[Pair], Mixture], templates: Split = "train"
    ) -> dict[str, float]:
        rows = []
        for pair in pairs:
            examples = pair_examples(pair, self.seed, self.prompts, templates)
            rows += [MixedRow(tokens(Row(*example)), mixture(pair)) for example in examples]
        return dict(zip(map("+".join, pairs), self._shares(rows), strict=True))

    def _three(self) -> dict[str, float]:
        cases = list(itertools.product(OPERATIONS, itertools.permutations(STYLES, 2)))
        rows = []
        for operation, (first, second) in cases:
            mixture = tuple((_INDEX[n], 1.0) for n in (operation, first, second))
            examples = three_way_examples(Pair(operation, first), second, self.seed, self.prompts)
            rows += [MixedRow(tokens(Row(*example)), mixture) for example in examples]
        names = [f"{operation}+{first}+{second}" for operation, (first, second) in cases]
        return dict(zip(names, self._shares(rows), strict=True))

    def _shares(self, rows: Sequence[MixedRow]) -> list[float]:
        rows = [MixedRow(row.tokens, row.mixture + self.always) for row in rows]
        right = exact_matches(self.decoder, self.adapters, rows)
        n = self.prompts
        return [round(sum(right[i : i + n]) / n, 4) for i in range(0, len(right), n)]


def _both(pair: Pair) -> Mixture:
    return ((_INDEX[pair.operation], 1.0), (_INDEX[pair.style], 1.0))


def _one(part: int) -> Callable[[Pair], Mixture]:
    return lambda pair: ((_INDEX[pair[part]], 1.0),)


def _other(rng: random.Random, index: int) -> int:
    return rng.choice([i for i in range(len(_NAMES)) if i != index])


def _wrong(rng: random.Random, pair: Pair) -> Mixture:
    operation = rng.choice([o for o in OPERATIONS if o != pair.operation])
    return _both(Pair(operation, rng.choice([s for s in STYLES if s != pair.style])))


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)
