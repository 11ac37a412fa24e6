"""What joint training teaches the router from, and what the router is judged on.

The prompts are split once, as ``fit_router`` splits them: wordings of each adapter, prompts for
several and half of those for none are kept, and some adapters are held out besides. Two routers
learn in one run. One has seen nothing of what is kept: on that its correction is judged, and its
gates are fitted. The other is fitted on everything, and is the one that is served. Both start as
the plain router and learn in the same way.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mora_serve.errors import InvalidArgument
from mora_serve.router.decide import Choice, decide
from mora_serve.router.format import Calibration, RouterFile, read_router
from mora_serve.router.router import Router
from router_training.batches import TokenRow
from router_training.gates import Case, fit_gates
from router_training.joint_router import GradedRouter, straight_through
from router_training.router import FitOptions, fit_router
from router_training.router_data import MIN_PROMPTS, Labelled, RouterData
from router_training.router_study import Study, projected

LEAST_KNOWN = 2  # adapters that the judged router learns from


@dataclass(frozen=True, slots=True)
class Example:
    """A row of training: its prompt as the router sees it, its tokens, the adapters it is for."""

    prompt: str
    tokens: TokenRow
    adapters: tuple[int, ...]


@dataclass(frozen=True)
class JointData:
    """Rows, the ``names`` of the adapters that their numbers mean, and prompts for no adapter.

    ``groups`` are the cards', by name; ``fingerprint`` is the base's.
    """

    examples: Sequence[Example]
    names: Sequence[str]
    outside: Sequence[str]
    groups: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str = ""

    def routing(self) -> RouterData:
        """The same as a router is fitted on.

        Raises InvalidArgument for fewer than 3 adapters, an adapter with fewer than 10 distinct
        prompts of its own, or fewer than 64 distinct prompts for none.
        """
        rows = [Labelled(e.prompt, tuple(self.names[i] for i in e.adapters)) for e in self.examples]
        data = RouterData(rows, far=self.outside, groups=self.groups)
        for name in sorted(set(self.names) - set(data.adapters)):
            raise InvalidArgument(
                f"data: no row is for adapter {name!r}; give {MIN_PROMPTS} or more, or leave it "
                "out",
                field="data",
            )
        try:
            data.check()
        except InvalidArgument as e:
            raise e if e.field == "outside" else e.at("data") from e
        return data


class Learner:
    """A router in training: its gates, and the prompts that it may learn from.

    ``known`` are the adapters that it learns from, by their numbers in ``study``; the others get
    no gate, so that nothing of them reaches it. ``whole``: it has the kept wordings as well.
    """

    def __init__(
        self,
        study: Study,
        content: RouterFile,
        known: Sequence[int],
        names: Sequence[str],
        rank: int,
        *,
        whole: bool,
    ) -> None:
        table = study.table
        self.content = content
        self._z = torch.from_numpy(study.embed(content, np.arange(len(table.texts))))
        self._index = table.index
        self._count = len(names)
        self._columns = torch.tensor([list(names).index(study.names[i]) for i in known])
        column = {study.names[i]: n for n, i in enumerate(known)}
        labelled: list[tuple[int, list[int]]] = []
        for n, i in enumerate(known):
            own = [*study.learn[i], *(study.kept[i] if whole else ())]
            labelled += [(int(row), [n]) for row in own]
        for mixture in study.mixtures[0]:
            if column.keys() >= set(mixture.adapters):
                own = [column[name] for name in mixture.adapters]
                labelled.append((table.index[mixture.prompt], own))
        self._rows = torch.tensor([row for row, _ in labelled])
        self._labels = torch.zeros(len(labelled), len(known))
        for row, (_, own) in zip(self._labels, labelled, strict=True):
            row[own] = 1.0
        self._outside = torch.from_numpy(np.concatenate((study.near[0], study.far[0])))
        self._prompts = {table.texts[row] for row, _ in labelled}
        keys = [study.learn[i][: study.options.key_prompts] for i in known]
        self.graded = GradedRouter([self._z[torch.from_numpy(own)] for own in keys], rank)

    def learns(self, prompt: str) -> bool:
        """Whether it may learn from this prompt."""
        return prompt in self._prompts

    def picked(self, prompts: Sequence[str]) -> Tensor:
        """The mixtures that its gates pick [prompts, adapters], straight through.

        Adapters that it does not know have 0, and no gradient.
        """
        rows = torch.tensor([self._index[p] for p in prompts])
        picks = straight_through(self.graded.logits(self._z[rows]))
        return torch.zeros(len(prompts), self._count).index_copy(1, self._columns, picks)

    def terms(self, count: int, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the gates on ``count`` labelled prompts, and on as many outside ones."""
        own = torch.tensor(rng.choices(range(len(self._rows)), k=count))
        others = torch.tensor(rng.choices(range(len(self._outside)), k=count))
        z = self._z[torch.cat([self._rows[own], self._outside[others]])]
        logits = self.graded.logits(z)
        inside, beyond = logits[:count], logits[count:]
        bce = F.binary_cross_entropy_with_logits
        known = bce(inside, self._labels[own], reduction="sum") / count
        return known, bce(beyond, torch.zeros_like(beyond), reduction="sum") / count

    def corrected(self) -> RouterFile:
        """The content with the correction that it has learned."""
        matrix = self.graded.embed.matrix()
        return projected(self.content, self.content.projection @ matrix)


@dataclass(frozen=True, eq=False)
class JointStudy:
    """The split, the router in training that is judged, and the one that is served."""

    study: Study
    held_out: tuple[int, ...]  # numbers in the study
    judged: Learner
    served: Learner

    @classmethod
    def of(
        cls, data: JointData, options: FitOptions, held_out: float, rank: int, seed: int
    ) -> JointStudy:
        """Fit the plain routers; a share ``held_out`` of the adapters is kept from the judged one.

        λ, the prototypes' weight and whether the plain router has a correction of its own are
        those of the fit on everything, which chooses them on adapters left out in turn.
        Raises what ``JointData.routing`` raises.
        """
        routing = data.routing()
        file, report = fit_router(routing, data.fingerprint, options)
        study = Study.of(routing, options, None)
        count = len(study.names)
        rng = random.Random(f"joint/{seed}")
        held = sorted(rng.sample(range(count), min(round(count * held_out), count - LEAST_KNOWN)))
        known = [i for i in range(count) if i not in held]
        router = study.router(study.whitening(known), report.strength, report.blend)
        if report.corrected:
            router = study.corrected(router, known)
        torch.manual_seed(seed)
        judged = Learner(study, router.content, known, data.names, rank, whole=False)
        whole = read_router(file)[0]
        served = Learner(study, whole, range(count), data.names, rank, whole=True)
        return cls(study, tuple(held), judged, served)

    def judge(self) -> tuple[RouterFile, dict[str, float | bool]]:
        """The router to serve, with its correction where the judged one gains by its own.

        Shares are of kept prompts as a server routes them, which have taught neither projection
        nor correction; the few numbers of the gates are fitted on them, for the plain router and
        the corrected one alike. The correction stays where neither adapters held out lose by it
        nor prompts for several, and the mean of the shares rises.
        """
        _, plain = self._measured(self.judged.content)
        calibration, other = self._measured(self.judged.corrected())
        kept = all(other[n] >= plain[n] for n in plain if n != "known")
        kept = kept and float(np.mean(list(other.values()))) > float(np.mean(list(plain.values())))
        figures: dict[str, float | bool] = {
            **{f"{name}_plain": round(value, 4) for name, value in plain.items()},
            **{f"{name}_corrected": round(value, 4) for name, value in other.items()},
            "kept": kept,
        }
        if not kept:
            return self.served.content, figures
        content = self.served.corrected()
        return dataclasses.replace(content, calibration=calibration, report=other), figures

    def _measured(self, content: RouterFile) -> tuple[Calibration, dict[str, float]]:
        """Gates fitted to a router, and its shares; one of which there is no prompt is left out."""
        router, study = Router(content), self.study
        cases = study.cases(router, None)
        if self.held_out:
            cases += study.cases(router, self.held_out)
        calibration = fit_gates(cases, content.calibration.blend)
        new = {study.names[i] for i in self.held_out}
        most = max(2, *(len(case.right) for case in cases))
        found: dict[str, list[bool]] = {"known": [], "held_out": [], "together": []}
        for case in cases:
            choice = decide(case.seen, calibration, most)
            if case.kind == "mixture":
                found["together"].append(set(choice.adapters) == case.right)
            elif case.kind == "new":
                found["held_out"].append(_best(choice, case))
            elif case.kind == "known" and not case.right & new:
                found["known"].append(_best(choice, case))
        return calibration, {name: float(np.mean(own)) for name, own in found.items() if own}


def _best(choice: Choice, case: Case) -> bool:
    return choice.candidates[0].adapter in case.right
