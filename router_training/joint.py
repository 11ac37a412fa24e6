"""Joint training: a shared set of adapters and the router together.

The loss of a step is the language model's under the rows' mixtures, plus what the router's gates
say of prompts whose adapters are known (binary cross-entropy, adapter by adapter), plus the same of
prompts for no adapter. Some rows run under the mixture that the gates pick, straight through, so
that the language model's loss reaches the router and adapters meet its mistakes. What the router
learns is a correction of its projection, which stays only where adapters that it has not learned
from do not lose by it. Data without labels is ``discover``'s, with the load balance it takes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mora_serve.errors import InvalidArgument
from mora_serve.model.decoder import Decoder
from mora_serve.model.stacked import StackedAdapters
from mora_serve.router.format import RouterFile
from mora_serve.router.router import Router
from router_training.batched import (
    AdapterRecipe,
    Log,
    MixedRow,
    mixture_weights,
    row_losses,
    train_adapters,
)
from router_training.batches import TokenRow
from router_training.joint_router import GradedRouter, fold, straight_through

LEAST_PROMPTS = 10  # distinct prompts for an adapter alone


@dataclass(frozen=True, slots=True)
class Example:
    """A row of training: its prompt as the router sees it, its tokens, the adapters it is for."""

    prompt: str
    tokens: TokenRow
    adapters: tuple[int, ...]


@dataclass(frozen=True)
class JointRecipe:
    """What rows and terms joint training has, beside the adapters' own recipe.

    ``mixed``: the share of rows with several adapters, where the data has them. Weights are drawn
    from 1 ± ``jitter``; a share ``wrong`` of the rows has a wrong adapter besides, at a weight
    from 0 to ``wrong_weight``; a share ``routed`` runs under the router's mixture. ``gates`` and
    ``outliers`` weigh the router's two terms, each over ``prompts`` prompts a step. A share
    ``held_out`` of the adapters is kept from the router's learning, to judge it by. ``lr`` and
    ``rank`` are the correction's.
    """

    adapters: AdapterRecipe = field(default_factory=AdapterRecipe)
    mixed: float = 0.5
    jitter: float = 0.2
    wrong: float = 0.3
    wrong_weight: float = 0.3
    routed: float = 0.25
    gates: float = 0.1
    outliers: float = 0.1
    prompts: int = 64
    held_out: float = 0.25
    key_prompts: int = 16
    lr: float = 3e-3
    rank: int = 16


@dataclass(frozen=True)
class Joint:
    """Adapters in the order of the data's, and the router's content.

    ``held_out`` are the adapters that the router has not learned from; where the correction was
    kept, its gates are still those of the plain router (``joint_router.calibrated`` fits new ones).
    ``figures``: top-1 accuracy on prompts kept out, of adapters that the router learned from
    (``known``) and of those that it did not (``held_out``), without and with its correction;
    ``kept`` says whether the correction stayed.
    """

    adapters: StackedAdapters
    router: RouterFile
    held_out: tuple[int, ...]
    figures: Mapping[str, float | bool]


def train_jointly(
    decoder: Decoder,
    examples: Sequence[Example],
    outside: Sequence[str],
    router: RouterFile,
    recipe: JointRecipe | None = None,
    log: Log = print,
    start: StackedAdapters | None = None,
) -> Joint:
    """Train as many adapters as ``examples`` name, and the correction of a fitted router.

    ``outside`` are prompts for no adapter. ``start``: adapters trained apart, to go on with.
    Raises InvalidArgument where an adapter has fewer than ten distinct prompts of its own, where
    there is none, or where ``start`` has not as many.
    """
    chosen = recipe or JointRecipe()
    count = 1 + max((i for e in examples for i in e.adapters), default=-1)
    if start is not None and start.count != count:
        raise InvalidArgument(
            f"adapters: {start.count} to go on with, but the rows name {count}; give one each",
            field="adapters",
        )
    study = _Study.of(examples, outside, router, count, chosen)
    torch.manual_seed(chosen.adapters.seed)
    graded = GradedRouter(study.keys, chosen.rank)
    run = _Run(study, graded, chosen)
    adapters = train_adapters(
        decoder,
        count,
        run.draw,
        chosen.adapters,
        log,
        penalty=lambda _: run.router_terms(),
        start=start,
        losses=run.losses,
        besides=[{"params": list(graded.parameters()), "lr": chosen.lr}],
    )
    content, figures = study.judge(fold(router, graded.correction()))
    log(f"router: {figures}")
    held_out = tuple(i for i, known in enumerate(study.known) if not known)
    return Joint(adapters, content, held_out, figures)


@dataclass(frozen=True, eq=False)
class _Study:
    """The data as training asks for it.

    ``z`` has every distinct prompt's embedding, ``keys`` [n, K] are those of each adapter's key
    prompts; ``kept`` are prompts of single adapters that no part of the router learns from.
    """

    examples: Sequence[Example]
    router: RouterFile
    z: Mapping[str, Tensor]
    outside: Tensor
    keys: Sequence[Tensor]
    key_prompts: Sequence[Sequence[str]]
    kept: Sequence[Sequence[str]]
    known: Sequence[bool]

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        outside: Sequence[str],
        content: RouterFile,
        count: int,
        recipe: JointRecipe,
    ) -> _Study:
        served = Router(content)
        z = {p: torch.from_numpy(served.embed(p)) for p in {e.prompt for e in examples}}
        rng = random.Random(f"joint/{recipe.adapters.seed}")
        key_prompts, kept = [], []
        for i in range(count):
            own = sorted({e.prompt for e in examples if e.adapters == (i,)})
            if len(own) < LEAST_PROMPTS:
                raise InvalidArgument(
                    f"data: adapter {i} has {len(own)} distinct prompts of its own; "
                    f"give {LEAST_PROMPTS} or more",
                    field="data",
                )
            rng.shuffle(own)
            kept.append(own[: max(1, len(own) // 5)])
            key_prompts.append(own[len(kept[-1]) :][: recipe.key_prompts])
        if not outside:
            raise InvalidArgument("outside: there is no prompt; give some", field="outside")
        held = set(rng.sample(range(count), round(count * recipe.held_out)))
        return cls(
            examples=examples,
            router=content,
            z=z,
            outside=torch.stack([torch.from_numpy(served.embed(p)) for p in outside]),
            keys=[torch.stack([z[p] for p in own]) for own in key_prompts],
            key_prompts=key_prompts,
            kept=kept,
            known=[i not in held for i in range(count)],
        )

    def judge(self, corrected: RouterFile) -> tuple[RouterFile, dict[str, float | bool]]:
        """The better of the plain router and the corrected one, as they would be served."""
        plain, other = self._top1(self.router), self._top1(corrected)
        mean = [np.mean([f["known"], f["held_out"]]) for f in (plain, other)]
        kept = bool(other["held_out"] >= plain["held_out"] and mean[1] > mean[0])
        figures: dict[str, float | bool] = {
            **{f"{name}_plain": value for name, value in plain.items()},
            **{f"{name}_corrected": value for name, value in other.items()},
            "kept": kept,
        }
        return corrected if kept else self.router, figures

    def _top1(self, content: RouterFile) -> dict[str, float]:
        router = Router(content)
        keys = [np.mean([router.embed(p) for p in own], 0) for own in self.key_prompts]
        table = np.stack([key / max(float(np.linalg.norm(key)), 1e-12) for key in keys])
        right: dict[bool, list[bool]] = {True: [], False: []}
        for i, own in enumerate(self.kept):
            found = [int((table @ router.embed(p)).argmax()) == i for p in own]
            right[self.known[i]] += found
        means = {flag: float(np.mean(found)) if found else 1.0 for flag, found in right.items()}
        return {"known": round(means[True], 4), "held_out": round(means[False], 4)}


@dataclass(frozen=True, slots=True)
class _JointRow(MixedRow):
    """A row with what the router has to do with it: its prompt, and whether it routes it."""

    prompt: str
    routed: bool


class _Run:
    """Draws rows and prompts, and says what they cost."""

    def __init__(self, study: _Study, graded: GradedRouter, recipe: JointRecipe) -> None:
        self._study, self._graded, self._recipe = study, graded, recipe
        self._rng = random.Random(f"joint/rows/{recipe.adapters.seed}")
        by_kind: dict[tuple[int, ...], list[Example]] = {}
        for example in study.examples:
            by_kind.setdefault(example.adapters, []).append(example)
        # A kind is a set of adapters: every one is drawn as often as the others of its size.
        self._single = [rows for kind, rows in by_kind.items() if len(kind) == 1]
        self._mixed = [rows for kind, rows in by_kind.items() if len(kind) > 1]
        count = len(study.keys)
        kept = {p for own in study.kept for p in own}
        learn = [
            e
            for e in study.examples
            if e.prompt not in kept and all(study.known[i] for i in e.adapters)
        ]
        self._learn = {e.prompt for e in learn}
        self._prompts = torch.stack([study.z[e.prompt] for e in learn])
        self._labels = torch.zeros(len(learn), count)
        for row, example in zip(self._labels, learn, strict=True):
            row[list(example.adapters)] = 1.0
        self._columns = torch.tensor(study.known)

    def draw(self) -> _JointRow:
        rng, recipe, study = self._rng, self._recipe, self._study
        mixed = self._mixed and rng.random() < recipe.mixed
        example = rng.choice(rng.choice(self._mixed if mixed else self._single))
        weights = {i: 1 + rng.uniform(-recipe.jitter, recipe.jitter) for i in example.adapters}
        if rng.random() < recipe.wrong:
            other = rng.randrange(len(study.keys))
            weights.setdefault(other, rng.uniform(0, recipe.wrong_weight))
        routed = example.prompt in self._learn and rng.random() < recipe.routed
        mixture = tuple(sorted(weights.items()))
        return _JointRow(example.tokens, mixture, example.prompt, routed)

    def losses(
        self, decoder: Decoder, adapters: StackedAdapters, rows: Sequence[MixedRow]
    ) -> Tensor:
        weights = mixture_weights(rows, adapters.count)
        support = weights != 0
        routed = [i for i, r in enumerate(rows) if isinstance(r, _JointRow) and r.routed]
        if not routed:
            return row_losses(decoder, adapters, rows)
        prompts = [r.prompt for r in rows if isinstance(r, _JointRow) and r.routed]
        logits = self._graded.logits(torch.stack([self._study.z[p] for p in prompts]))
        picked = straight_through(logits)
        index = torch.tensor(routed)
        # Its own adapters stay within reach of a gate that is shut, so that it can learn to open.
        within = support[index] | (picked.detach() > 0.5)
        support = support.index_copy(0, index, within)
        weights = weights.index_copy(0, index, picked * within)
        return row_losses(decoder, adapters, rows, weights, support)

    def router_terms(self) -> Tensor:
        """Cross-entropy of the gates, of prompts whose adapters are known and of outside ones."""
        recipe, columns = self._recipe, self._columns
        own = torch.tensor(self._rng.choices(range(len(self._prompts)), k=recipe.prompts))
        others = torch.tensor(self._rng.choices(range(len(self._study.outside)), k=recipe.prompts))
        z = torch.cat([self._prompts[own], self._study.outside[others]])
        logits = self._graded.logits(z)[:, columns]
        inside, beyond = logits[: recipe.prompts], logits[recipe.prompts :]
        labels = self._labels[own][:, columns]
        bce = F.binary_cross_entropy_with_logits
        known = bce(inside, labels, reduction="sum") / recipe.prompts
        outlier = bce(beyond, torch.zeros_like(beyond), reduction="sum") / recipe.prompts
        return recipe.gates * known + recipe.outliers * outlier
