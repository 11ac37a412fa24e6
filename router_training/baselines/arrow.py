"""Arrow (arXiv 2405.11157) as PEFT has it: per token and layer, no training.

An adapter's prototype at a linear is the top right singular vector of BA; a token is routed there
to the adapters whose prototypes its input is most along, by a softmax over the best few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from router_training.baselines.plain import Encode, batches, exact_match, plain_model, prompt_mean
from router_training.evaluation.cases import Case
from router_training.evaluation.metrics import Array
from router_training.evaluation.scored import Scored


class ArrowModel:
    """PEFT's Arrow model over a bundle's adapters; nothing of it is trained."""

    def __init__(
        self,
        base: Path,
        adapters: Mapping[str, Path],
        encode: Encode,
        top_k: int = 3,
        temperature: float = 1.0,
    ) -> None:
        from peft import ArrowConfig, create_arrow_model

        self.names = tuple(adapters)
        self._encode = encode
        config = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
        paths = [str(path) for path in adapters.values()]
        self._model = create_arrow_model(plain_model(base), paths, config).eval()

    def right(self, cases: Sequence[Case]) -> Array:
        """1.0 where the whole answer is right, else 0.0 [n]."""
        return exact_match(self._model, [self._encode(case) for case in cases])

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Scored:
        """An adapter's score is its mean coefficient over the prompt's tokens and all linears."""
        rows = [self._encode(Case(prompt)) for prompt in prompts]
        ranking = np.zeros((len(rows), len(self.names)))
        for at, batch in batches(rows):
            found = _Coefficients(self._model)
            self._model(input_ids=batch.inputs)
            ranking[at] = prompt_mean(found.mean(), batch).numpy()
        chosen = tuple((self.names[i],) for i in ranking.argmax(1))
        return Scored(self.names, ranking, None, ranking.max(1), chosen)


class _Coefficients:
    """Collects one pass's coefficients [B, L, adapters] of every linear."""

    def __init__(self, model: nn.Module) -> None:
        from peft.tuners.lora.arrow import ArrowLoraLinearLayer

        self._sum: Tensor | None = None
        self._count = 0
        self._hooks = [
            module.register_forward_pre_hook(self._see)
            for module in model.modules()
            if isinstance(module, ArrowLoraLinearLayer)
        ]

    def _see(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        # As the layer computes them; it keeps them to itself.
        similarity = (inputs[0] @ layer.prototypes.T).abs()
        best, index = similarity.topk(layer.top_k, dim=-1)
        scores = torch.full_like(similarity, -torch.inf).scatter(-1, index, best)
        weights = torch.softmax(scores / layer.temperature, -1)
        self._sum = weights if self._sum is None else self._sum + weights
        self._count += 1

    def mean(self) -> Tensor:
        """The mean over the linears, after one pass."""
        for hook in self._hooks:
            hook.remove()
        if self._sum is None:
            raise RuntimeError("the model has no linear that Arrow routes")
        return self._sum / self._count
