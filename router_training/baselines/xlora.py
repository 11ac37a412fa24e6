"""X-LoRA (arXiv 2402.07148) as PEFT has it: gates per token, trained over frozen adapters.

A first pass without adapters gives every token a hidden state, a linear layer on it the adapters'
weights for the second pass.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from router_training.baselines.plain import Encode, batches, exact_match, plain_model, prompt_mean
from router_training.batched import Log
from router_training.batches import bucketed, chunks, collate
from router_training.evaluation.cases import Case
from router_training.evaluation.metrics import Array
from router_training.evaluation.scored import Scored


@dataclass(frozen=True)
class XLoraRecipe:
    """Training of the gates alone, on the language-model loss of the answers."""

    steps: int = 150
    rows: int = 24
    lr: float = 1e-2
    softmax: bool = True
    layerwise: bool = False
    seed: int = 0


class XLoraModel:
    """PEFT's X-LoRA over a bundle's adapters, all known to it from the start."""

    def __init__(
        self, base: Path, adapters: Mapping[str, Path], encode: Encode, recipe: XLoraRecipe
    ) -> None:
        from peft import XLoraConfig, get_peft_model

        self.names = tuple(adapters)
        self._encode, self._recipe = encode, recipe
        torch.manual_seed(recipe.seed)
        model = plain_model(base)
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=model.config.hidden_size,
            adapters={str(i): str(path) for i, path in enumerate(adapters.values())},
            enable_softmax=recipe.softmax,
            layerwise_scalings=recipe.layerwise,
        )
        self._model = get_peft_model(model, config)

    def train(self, cases: Sequence[Case], log: Log) -> None:
        """Train the gates on labelled prompts; the labels are not used, the answers are."""
        recipe = self._recipe
        rng = random.Random(recipe.seed)
        rows = [self._encode(case) for case in cases]
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
        drawn = bucketed(lambda: rng.choice(rows), len, recipe.rows, rng)
        started = time.monotonic()
        for step in range(1, recipe.steps + 1):
            optimizer.zero_grad()
            loss = 0.0
            for part in chunks(next(drawn), 24):
                batch = collate(part)
                logits = self._model(input_ids=batch.inputs).logits
                losses = F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")
                share = ((losses * batch.answer).sum(1) / batch.answer.sum(1)).sum() / recipe.rows
                torch.autograd.backward(share)
                loss += share.item()
            optimizer.step()
            schedule.step()
            if step % 25 == 0:
                seconds = time.monotonic() - started
                log(f"X-LoRA {step}/{recipe.steps} {seconds:.0f}s loss {loss:.3f}")

    def right(self, cases: Sequence[Case]) -> Array:
        """1.0 where the whole answer is right, else 0.0 [n]."""
        return exact_match(self._model, [self._encode(case) for case in cases])

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Scored:
        """An adapter's score is its mean gate over the prompt's tokens and all linears."""
        rows = [self._encode(Case(prompt)) for prompt in prompts]
        ranking = np.zeros((len(rows), len(self.names)))
        for at, batch in batches(rows):
            self._model(input_ids=batch.inputs)
            gates: Any = self._model.base_model.get_latest_scalings()  # [B, L, linears, adapters]
            ranking[at] = prompt_mean(gates.mean(2), batch).numpy()
        chosen = tuple((self.names[i],) for i in ranking.argmax(1))
        return Scored(self.names, ranking, None, ranking.max(1), chosen)
