"""How well a router does on the demo's world: prompts that no fitting has seen."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

from mora_serve.config import RouterConfig
from mora_serve.core import DEFAULT_TENANT
from mora_serve.router.decide import Choice, decide
from mora_serve.router.evidence import gather
from mora_serve.router.index import Index
from mora_serve.router.router import Router
from mora_serve.router.rows import Entry
from router_training.demo.near_domain import near_domain
from router_training.demo.out_of_domain import out_of_domain
from router_training.demo.pairs import PAIRS, pair_examples
from router_training.demo.reworded import known_share, reworded_examples
from router_training.demo.tasks import KNOWN, TASKS, Split
from router_training.router_report import auroc, calibration_error

FAMILIAR = 0.5  # the share of content words from which a wording counts as one of known words


class Routes(Protocol):
    """Routes prompts among the adapters of ``names``, all registered."""

    @property
    def names(self) -> Sequence[str]:
        """Adapters, named as their tasks."""

    def route(self, prompt: str) -> Choice:
        """The router's choice."""


@dataclass(frozen=True, eq=False)
class Registered:
    """A router with some demo adapters registered by example prompts."""

    router: Router
    names: Sequence[str]
    index: Index

    @classmethod
    def of(cls, router: Router, examples: Mapping[str, Iterable[str]]) -> Self:
        """From example prompts by task."""
        keys = {name: router.key(own) for name, own in examples.items()}
        entries = [Entry(n, key, TASKS[n].group) for n, key in keys.items() if key is not None]
        return cls(router, tuple(keys), Index.of((DEFAULT_TENANT, e) for e in entries))

    def route(self, prompt: str) -> Choice:
        """The router's choice under the server's default limit."""
        seen = gather(self.router, self.index, DEFAULT_TENANT, prompt)
        return decide(seen, self.router.calibration, RouterConfig().max_adapters)


class Asked(NamedTuple):
    """A prompt, the adapters that have to run, and where it is from.

    ``wording``: trained (templates of the fit, fresh operands), kept (templates kept for
    testing), reworded (new sentences), near or far. ``known``: at least half of the content
    words are in the task's training templates.
    """

    prompt: str
    right: frozenset[str]
    wording: str
    known: bool = True


def questions(names: Sequence[str], seed: int, prompts: int) -> list[Asked]:
    """``prompts`` prompts a task and wording, a quarter of that a pair, 8 times that outside."""
    asked: list[Asked] = []
    splits: tuple[tuple[Split, str], ...] = (("train", "trained"), ("test", "kept"))
    for split, wording in splits:
        for name in names:
            for prompt, _ in TASKS[name].examples(seed, prompts, split):
                asked.append(Asked(prompt, frozenset([name]), wording, _familiar(prompt, [name])))
        for pair in PAIRS:
            if set(pair) <= set(names):
                for prompt, _ in pair_examples(pair, seed, max(1, prompts // 4), split):
                    asked.append(Asked(prompt, frozenset(pair), wording, _familiar(prompt, pair)))
    for name in names:
        for known in (True, False):
            bounds = {"least": FAMILIAR} if known else {"most": FAMILIAR - 1e-9}
            for prompt, _ in reworded_examples(name, seed, prompts, **bounds):
                asked.append(Asked(prompt, frozenset([name]), "reworded", known))
    rng = random.Random(f"evaluate/{seed}")
    for _ in range(8 * prompts):
        asked.append(Asked(near_domain(rng, "test"), frozenset(), "near"))
        asked.append(Asked(out_of_domain(rng, "test"), frozenset(), "far"))
    return asked


def _familiar(prompt: str, tasks: Iterable[str]) -> bool:
    """Whether the template that a prompt is made of has enough known words, for each task."""
    text = prompt.lower()
    for name in tasks:
        for template in (*TASKS[name].test, *TASKS[name].tails["test"]):
            pattern = re.escape(template).replace(r"\{x\}", "'[^']*'")
            if re.search(pattern, text) and known_share(name, template) < FAMILIAR:
                return False
    return True


class Answered(NamedTuple):
    """A question and what the router said to it."""

    asked: Asked
    choice: Choice

    @property
    def top(self) -> bool:
        """Whether the best candidate is a right one."""
        return self.choice.candidates[0].adapter in self.asked.right

    @property
    def exact(self) -> bool:
        """Whether exactly the right adapters run."""
        return set(self.choice.adapters) == self.asked.right

    @property
    def probability(self) -> float:
        """The best candidate's: what abstention goes by."""
        return self.choice.candidates[0].probability


def answers(router: Routes, asked: Iterable[Asked]) -> list[Answered]:
    """Route every question."""
    return [Answered(question, router.route(question.prompt)) for question in asked]


def figures(answered: Sequence[Answered], known: Collection[str] = KNOWN) -> dict[str, float]:
    """One router's figures, flat; ``known`` are the adapters that it was fitted on.

    ``known_*``, ``held_out_*``: single tasks. ``top1``: a right adapter scores best among all;
    ``alone``: exactly it runs. ``pairs_exact``: exactly both run. Each in kept wordings, in those
    of known words alone (``_known_words``), and in trained ones (``_trained``).
    ``reworded_top1``, ``new_words_top1``: new sentences, of known words or not. ``*_auroc``: of
    the abstention score, single and pair prompts in kept wordings against prompts of nobody.
    ``abstained``: the share of the former that get the base; ``*_accepted``: that of the latter
    which get an adapter. ``calibration_error``: see ``judged``. 0 where nothing was asked.
    """
    fitted = set(known)
    single = [a for a in answered if len(a.asked.right) == 1]
    groups = {
        "known": [a for a in single if a.asked.right <= fitted],
        "held_out": [a for a in single if not a.asked.right <= fitted],
        "pairs": [a for a in answered if len(a.asked.right) == 2],
    }
    out: dict[str, float] = {}
    for group, own in groups.items():
        kept = [a for a in own if a.asked.wording == "kept"]
        wordings = {
            "": kept,
            "_known_words": [a for a in kept if a.asked.known],
            "_trained": [a for a in own if a.asked.wording == "trained"],
        }
        for suffix, asked in wordings.items():
            if group == "pairs":
                out[f"pairs_exact{suffix}"] = _share(a.exact for a in asked)
            else:
                out[f"{group}_top1{suffix}"] = _share(a.top for a in asked)
                out[f"{group}_alone{suffix}"] = _share(a.exact for a in asked)
    reworded = [a for a in single if a.asked.wording == "reworded"]
    out["reworded_top1"] = _share(a.top for a in reworded if a.asked.known)
    out["new_words_top1"] = _share(a.top for a in reworded if not a.asked.known)
    inside = [a for a in answered if a.asked.wording == "kept"]
    out["abstained"] = _share(not a.choice.adapters for a in inside)
    for name, wording in (("near_domain", "near"), ("out_of_domain", "far")):
        others = [a for a in answered if a.asked.wording == wording]
        scores = [a.probability for a in others]
        out[f"{name}_auroc"] = round(auroc([a.probability for a in inside], scores), 4)
        out[f"{name}_accepted"] = _share(bool(a.choice.adapters) for a in others)
    top, every = judged(answered, known)
    out["calibration_error"] = round(error(top), 4)
    out["calibration_error_all"] = round(error(every), 4)
    return out


class Judged(NamedTuple):
    """A probability, whether what it was of was right, and how much that counts."""

    probability: float
    right: bool
    weight: float


def judged(
    answered: Sequence[Answered], known: Collection[str]
) -> tuple[list[Judged], list[Judged]]:
    """The probabilities of the best candidates, and all that are above 0.01.

    Weighted so that four kinds of prompts count the same: known and held-out adapters in trained
    wordings; single tasks in kept wordings and in new sentences of known words; near-domain ones.
    """
    fitted = set(known)

    def kind(asked: Asked) -> str:
        if asked.wording == "near":
            return "near"
        if len(asked.right) != 1 or asked.wording == "far" or not asked.known:
            return ""
        if asked.wording == "trained":
            return "known" if asked.right <= fitted else "held-out"
        return "new"

    parts = Counter(kind(a.asked) for a in answered)
    top: list[Judged] = []
    every: list[Judged] = []
    for answer in answered:
        if not (part := kind(answer.asked)):
            continue
        for rank, candidate in enumerate(answer.choice.candidates):
            right = candidate.adapter in answer.asked.right
            one = Judged(candidate.probability, right, 1 / parts[part])
            top += [one] * (rank == 0)
            every += [one] * (candidate.probability > 0.01)
    return top, every


def error(found: Iterable[Judged]) -> float:
    """The calibration error of judged probabilities, over bins of equal mass."""
    probability, right, weight = zip(*found, strict=True)
    return calibration_error(probability, right, weight)


def _share(holds: Iterable[bool]) -> float:
    found = list(holds)
    return round(sum(found) / len(found), 4) if found else 0.0
