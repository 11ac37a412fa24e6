"""The router's part of joint training: its gates, differentiable, with a learned correction.

z are prompts as a fitted router embeds them. The correction is z + (z U) V, normalised: it starts
as nothing, has few parameters, and folds into the router's own projection, so that the server
needs no new code and keys are still made from the prompts of any adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from router_training.correction import LowRank


class GradedRouter(nn.Module):
    """Probabilities that prompts are for adapters: σ((z·k_i - position) / width).

    k_i is the mean direction of adapter i's own prompts, under the correction as it stands.
    ``examples`` [n_i, K] are these prompts' z.
    """

    def __init__(self, examples: Sequence[Tensor], rank: int = 16) -> None:
        super().__init__()
        self.examples = list(examples)
        self.embed = LowRank(examples[0].shape[1], rank)
        keys = torch.stack([F.normalize(z.mean(0), dim=0) for z in self.examples])
        own = torch.cat([z @ k for z, k in zip(self.examples, keys, strict=True)]).mean()
        others = (torch.cat(self.examples) @ keys.T).mean()
        # Open half-way between an own prompt's score and anybody's, 0.95 at an own one's.
        self.position = nn.Parameter((own + others) / 2)
        self.log_width = nn.Parameter(((own - others).clamp(min=0.02) / 6).log())

    def keys(self) -> Tensor:
        """[adapters, K]"""
        means = [self.embed(z).mean(0) for z in self.examples]
        return F.normalize(torch.stack(means), dim=-1)

    def logits(self, z: Tensor) -> Tensor:
        """[n, K] -> [n, adapters], the gates' log-odds."""
        embedded: Tensor = self.embed(z)
        return (embedded @ self.keys().T - self.position) / self.log_width.exp()


def straight_through(logits: Tensor, most: int = 4) -> Tensor:
    """The mixtures that the gates pick [n, adapters]: 1 above one half, at most ``most`` a row.

    Gradients are the probabilities' own.
    """
    probability = logits.sigmoid()
    best = torch.zeros_like(probability, dtype=torch.bool)
    best.scatter_(1, probability.topk(min(most, probability.shape[1]), dim=1).indices, True)
    picked = ((probability > 0.5) & best).to(probability.dtype)
    return picked + probability - probability.detach()
