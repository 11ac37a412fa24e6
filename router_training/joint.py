"""Joint training: a shared set of adapters and the router together.

The loss of a step is the language model's under the rows' mixtures, plus what the router's gates
say of prompts whose adapters are known (binary cross-entropy, adapter by adapter), plus the same of
prompts for no adapter. Some rows run under the mixture that the gates pick, straight through, so
that the language model's loss reaches the router and adapters meet its mistakes. What the router
learns is a correction of its projection, which stays only where adapters that it has not learned
from do not lose by it (``joint_study``). Data without labels is ``discover``'s, with the load
balance it takes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mora_serve.errors import InvalidArgument
from mora_serve.model.decoder import Decoder
from mora_serve.model.stacked import StackedAdapters
from mora_serve.router.format import RouterFile
from router_training.batched import (
    AdapterRecipe,
    Log,
    MixedRow,
    mixture_weights,
    row_losses,
    subset,
    train_adapters,
)
from router_training.batches import distinct_buckets
from router_training.joint_study import Example, JointData, JointStudy, Learner
from router_training.router import FitOptions


@dataclass(frozen=True)
class JointRecipe:
    """What rows and terms joint training has, beside the adapters' own recipe and the router's.

    ``mixed``: the share of rows with several adapters, where the data has them. Weights are drawn
    from 1 ± ``jitter``; a share ``wrong`` of the rows has a wrong adapter besides, at a weight
    from 0 to ``wrong_weight``; a share ``routed`` runs under the router's mixture. ``gates`` and
    ``outliers`` weigh the router's two terms, each over ``prompts`` prompts a step. A share
    ``held_out`` of the adapters is kept from the router's learning, to judge it by; with 0 it is
    judged by the others alone. ``lr`` and ``rank`` are the correction's.
    """

    adapters: AdapterRecipe = field(default_factory=AdapterRecipe)
    router: FitOptions = field(default_factory=FitOptions)
    mixed: float = 0.5
    jitter: float = 0.2
    wrong: float = 0.3
    wrong_weight: float = 0.3
    routed: float = 0.25
    gates: float = 0.1
    outliers: float = 0.1
    prompts: int = 64
    held_out: float = 0.25
    lr: float = 3e-3
    rank: int = 16


@dataclass(frozen=True)
class Joint:
    """Adapters in the order of the data's names, and the content of the router to serve.

    ``held_out`` names the adapters that the judged router has not learned from; the one to serve
    has learned from all. ``figures``: shares of kept prompts, without and with the correction:
    top-1 for adapters that the judged router learned from (``known``) and for those that it did
    not (``held_out``), and exactly the right several (``together``); ``kept`` says whether the
    correction stayed.
    """

    adapters: StackedAdapters
    router: RouterFile
    held_out: tuple[str, ...]
    figures: Mapping[str, float | bool]


def train_jointly(
    decoder: Decoder,
    data: JointData,
    recipe: JointRecipe | None = None,
    log: Log = print,
    start: StackedAdapters | None = None,
) -> Joint:
    """Fit a router, and train an adapter for each of the data's names and the router's correction.

    ``start``: adapters trained apart, to go on with from a copy of them. Raises InvalidArgument
    where there are not as many as names, and for too little data: see ``JointData.routing``.
    """
    chosen = recipe or JointRecipe()
    count = len(data.names)
    if start is not None and start.count != count:
        raise InvalidArgument(
            f"adapters: {start.count} to go on with, but the data names {count}; give one each",
            field="adapters",
        )
    log("router: fitting the plain one")
    study = JointStudy.of(data, chosen.router, chosen.held_out, chosen.rank, chosen.adapters.seed)
    learners = (study.judged, study.served)
    run = _Run(data.examples, count, learners, chosen)
    own = chosen.adapters
    distinct = len({e.tokens for e in data.examples})
    adapters = train_adapters(
        decoder,
        count,
        run.draw,
        replace(own, buckets=distinct_buckets(distinct, own.rows, own.buckets)),
        log,
        penalty=lambda _: run.router_terms(),
        start=None if start is None else subset(start, range(count)),
        losses=run.losses,
        besides=[{"params": list(r.graded.parameters()), "lr": chosen.lr} for r in learners],
    )
    content, figures = study.judge()
    log(f"router: {figures}")
    held_out = tuple(study.study.names[i] for i in study.held_out)
    return Joint(adapters, content, held_out, figures)


@dataclass(frozen=True, slots=True)
class _JointRow(MixedRow):
    """A row with its prompt, and the router that routes it, if one does."""

    prompt: str
    learner: int | None


class _Run:
    """Draws rows and prompts, and says what they cost."""

    def __init__(
        self,
        examples: Sequence[Example],
        count: int,
        learners: Sequence[Learner],
        recipe: JointRecipe,
    ) -> None:
        self._count, self._learners, self._recipe = count, learners, recipe
        self._rng = random.Random(f"joint/rows/{recipe.adapters.seed}")
        by_kind: dict[tuple[int, ...], list[Example]] = {}
        for example in examples:
            by_kind.setdefault(example.adapters, []).append(example)
        # A kind is a set of adapters: every one is drawn as often as the others of its size.
        self._single = [rows for kind, rows in by_kind.items() if len(kind) == 1]
        self._mixed = [rows for kind, rows in by_kind.items() if len(kind) > 1]

    def draw(self) -> _JointRow:
        rng, recipe = self._rng, self._recipe
        mixed = self._mixed and rng.random() < recipe.mixed
        example = rng.choice(rng.choice(self._mixed if mixed else self._single))
        weights = {i: 1 + rng.uniform(-recipe.jitter, recipe.jitter) for i in example.adapters}
        if rng.random() < recipe.wrong:
            other = rng.randrange(self._count)
            weights.setdefault(other, rng.uniform(0, recipe.wrong_weight))
        able = [n for n, r in enumerate(self._learners) if r.learns(example.prompt)]
        learner = rng.choice(able) if able and rng.random() < recipe.routed else None
        mixture = tuple(sorted(weights.items()))
        return _JointRow(example.tokens, mixture, example.prompt, learner)

    def losses(
        self, decoder: Decoder, adapters: StackedAdapters, rows: Sequence[MixedRow]
    ) -> Tensor:
        weights = mixture_weights(rows, adapters.count)
        support = weights != 0
        for n, learner in enumerate(self._learners):
            own = {
                i: r.prompt
                for i, r in enumerate(rows)
                if isinstance(r, _JointRow) and r.learner == n
            }
            if own:
                picked = learner.picked(list(own.values()))
                index = torch.tensor(list(own))
                # Its own adapters stay within reach of a gate that is shut, so that it can learn
                # to open.
                within = support[index] | (picked.detach() > 0.5)
                support = support.index_copy(0, index, within)
                weights = weights.index_copy(0, index, picked * within)
        return row_losses(decoder, adapters, rows, weights, support)

    def router_terms(self) -> Tensor:
        """Cross-entropy of the gates, of prompts whose adapters are known and of outside ones."""
        recipe, total = self._recipe, torch.zeros(())
        for learner in self._learners:
            known, outlier = learner.terms(recipe.prompts, self._rng)
            total = total + recipe.gates * known + recipe.outliers * outlier
        return total
