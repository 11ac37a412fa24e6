"""A bundle in memory, as the server would run it: decoder, adapters, router."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from mora_serve.adapters import card
from mora_serve.config import AdaptersConfig, BaseConfig
from mora_serve.model.loading import load_base
from mora_serve.model.pooling import pooled_hidden
from mora_serve.router.decide import Choice
from mora_serve.router.features import Pool
from mora_serve.router.router import Router
from mora_serve.router.routing import ROUTER_FILE
from router_training.demo.manifest import Manifest
from router_training.evaluation.scored import RouterScorer
from router_training.generation import greedy
from router_training.peft_files import load_peft

__all__ = ["ROUTER_FILE", "LoadedBundle"]


class LoadedBundle:
    """Answers and routes with a bundle's models; all its adapters are registered.

    The router's keys come from the example prompts on the adapters' cards, for the tasks that it
    was fitted on as for the others. ``cards`` are these by name.
    """

    def __init__(self, bundle: Path, dtype: Literal["fp32", "bf16"] = "fp32") -> None:
        self.manifest = Manifest.read(bundle)
        self.base = load_base(
            BaseConfig(str(bundle / self.manifest.base), dtype=dtype, device="cpu")
        )
        self.names = tuple(a.name for a in self.manifest.adapters)
        directories = [bundle / a.directory for a in self.manifest.adapters]
        self.adapters = load_peft(self.base.shape, directories).to(self.base.decoder.dtype)
        data = (bundle / self.manifest.router / ROUTER_FILE).read_bytes()
        self.router = Router.load(data, self.base.fingerprint)
        self.cards = {
            name: card.parse_card((directory / card.FILE).read_bytes(), AdaptersConfig())
            for name, directory in zip(self.names, directories, strict=True)
        }
        self.scorer = RouterScorer(
            self.router,
            {name: routing.prompts for name, routing in self.cards.items()},
            {name: routing.group for name, routing in self.cards.items()},
            self.pool,
        )

    def answers(
        self, prompts: Sequence[Sequence[int]], mixtures: Sequence[Sequence[str]], limit: int
    ) -> list[str]:
        """Greedy answers to encoded prompts, each under the adapters named for it, at weight 1."""
        weights = torch.zeros(len(prompts), len(self.names), dtype=self.base.decoder.dtype)
        for row, mixture in zip(weights, mixtures, strict=True):
            for name in mixture:
                row[self.names.index(name)] = 1.0
        adapters = self.adapters if weights.any() else None
        ids = greedy(
            self.base.decoder, prompts, self.base.tokenizer.eos_ids, limit, adapters, weights
        )
        return [self.base.tokenizer.decode(answer) for answer in ids]

    @property
    def pool(self) -> Pool | None:
        """Gives the states of texts, where the router is on hidden states."""
        hidden, base = self.router.hidden, self.base
        if hidden is None:
            return None
        return lambda texts: pooled_hidden(
            base.decoder, base.tokenizer, texts, hidden.depth, hidden.max_tokens
        )

    def route(self, prompt: str) -> Choice:
        """The router's choice under the server's default limit."""
        return self.scorer.route(prompt)
