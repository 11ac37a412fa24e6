"""A base and its adapters on the server's decoder, asked for greedy answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mora_serve.model.loading import Base
from mora_serve.model.stacked import StackedAdapters
from router_training.batches import chunks
from router_training.evaluation.cases import Case
from router_training.evaluation.metrics import Array
from router_training.evaluation.quality import Mixture
from router_training.generation import greedy

_BAND = 192  # rows that are generated to one length

_Asked = tuple[str, str, tuple[tuple[str, float], ...]]


class Answering:
    """Whether answers are right; what was asked once is not generated again."""

    def __init__(self, base: Base, adapters: StackedAdapters, names: Sequence[str]) -> None:
        self.base, self.adapters, self.names = base, adapters, tuple(names)
        self._texts: dict[_Asked, tuple[int, str]] = {}  # generated up to a limit

    def right(self, cases: Sequence[Case], mixtures: Sequence[Mixture], system: str = "") -> Array:
        """1.0 where the whole greedy answer is right, else 0.0 [n]; ``system`` is a turn ahead.

        A text is generated to one token more than the right answer may have.
        """
        asked: list[_Asked] = [
            (system, case.prompt, tuple(sorted(mixture.items())))
            for case, mixture in zip(cases, mixtures, strict=True)
        ]
        limits: dict[_Asked, int] = {}
        for key, case in zip(asked, cases, strict=True):
            limits[key] = max(limits.get(key, 0), 1 + len(case.answer.encode()))
        new = [key for key, limit in limits.items() if self._texts.get(key, (0, ""))[0] < limit]
        for band in chunks(sorted(new, key=limits.__getitem__), _BAND):
            limit = limits[band[-1]]
            answers = self._answers(band, limit)
            self._texts |= {k: (limit, text) for k, text in zip(band, answers, strict=True)}
        right = [self._texts[key][1] == case.answer for key, case in zip(asked, cases, strict=True)]
        return np.array(right, np.float64)

    def _answers(self, asked: Sequence[_Asked], limit: int) -> list[str]:
        tokenizer = self.base.tokenizer
        columns = {name: i for i, name in enumerate(self.names)}
        weights = torch.zeros(len(asked), len(self.names), dtype=self.base.decoder.dtype)
        prompts = []
        for row, (system, prompt, mixture) in zip(weights, asked, strict=True):
            ahead = [("system", system)] if system else []
            prompts.append(tokenizer.chat([*ahead, ("user", prompt)]))
            for name, weight in mixture:
                row[columns[name]] = weight
        found = greedy(
            self.base.decoder,
            prompts,
            tokenizer.eos_ids,
            limit,
            self.adapters if weights.any() else None,
            weights,
        )
        return [tokenizer.decode(answer) for answer in found]
