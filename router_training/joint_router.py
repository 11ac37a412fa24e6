"""The router's part of joint training: its gates, differentiable, with a learned correction.

z are prompts as a fitted router embeds them. The correction is z + (z U) V, normalised: it starts
as nothing, has few parameters, and folds into the router's own projection, so that the server
needs no new code and keys are still made from the prompts of any adapter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mora_serve.router.format import RouterFile
from mora_serve.router.int8 import to_int8
from mora_serve.router.router import Router
from router_training.gates import fit_gates
from router_training.router_data import RouterData
from router_training.router_study import FitOptions, Study


class GradedRouter(nn.Module):
    """Probabilities that prompts are for adapters: σ((z·k_i - position) / width).

    k_i is the mean direction of adapter i's own prompts, under the correction as it stands.
    ``examples`` [n_i, K] are these prompts' z.
    """

    def __init__(self, examples: Sequence[Tensor], rank: int = 16) -> None:
        super().__init__()
        size = examples[0].shape[1]
        self.examples = list(examples)
        self.down = nn.Parameter(torch.randn(size, rank) * size**-0.5)
        self.up = nn.Parameter(torch.zeros(rank, size))
        keys = torch.stack([F.normalize(z.mean(0), dim=0) for z in self.examples])
        own = torch.cat([z @ k for z, k in zip(self.examples, keys, strict=True)]).mean()
        others = (torch.cat(self.examples) @ keys.T).mean()
        # Open half-way between an own prompt's score and anybody's, 0.95 at an own one's.
        self.position = nn.Parameter((own + others) / 2)
        self.log_width = nn.Parameter(((own - others).clamp(min=0.02) / 6).log())

    def embed(self, z: Tensor) -> Tensor:
        """z [..., K] corrected, of norm 1."""
        return F.normalize(z + z @ self.down @ self.up, dim=-1)

    def keys(self) -> Tensor:
        """[adapters, K]"""
        means = [self.embed(z).mean(0) for z in self.examples]
        return F.normalize(torch.stack(means), dim=-1)

    def logits(self, z: Tensor) -> Tensor:
        """[n, K] -> [n, adapters], the gates' log-odds."""
        return (self.embed(z) @ self.keys().T - self.position) / self.log_width.exp()

    @torch.no_grad()
    def correction(self) -> Tensor:
        """The matrix [K, K] that multiplies z, before it is normalised."""
        return torch.eye(len(self.down)) + self.down @ self.up


def straight_through(logits: Tensor, most: int = 4) -> Tensor:
    """The mixtures that the gates pick [n, adapters]: 1 above one half, at most ``most`` a row.

    Gradients are the probabilities' own.
    """
    probability = logits.sigmoid()
    best = torch.zeros_like(probability, dtype=torch.bool)
    best.scatter_(1, probability.topk(min(most, probability.shape[1]), dim=1).indices, True)
    picked = ((probability > 0.5) & best).to(probability.dtype)
    return picked + probability - probability.detach()


def fold(content: RouterFile, correction: Tensor) -> RouterFile:
    """The router's file with the correction [K, K] in its projection."""
    matrix = correction.double().numpy()
    projection = content.projection.astype(np.float64) @ matrix
    # Prompts are normalised after it, so its scale says nothing; codes keep to the file's range.
    projection /= max(1.0, float(np.abs(projection).max()))
    codes, scales = to_int8(projection.T.astype(np.float32))
    return dataclasses.replace(content, codes=codes, scales=scales)


def calibrated(
    content: RouterFile, data: RouterData, new: Collection[str], options: FitOptions
) -> RouterFile:
    """A changed router with gates fitted to it; ``new`` names adapters that it has not seen."""
    study = Study.of(data, options, None)
    router = Router(content)
    held = [i for i, name in enumerate(study.names) if name in new]
    cases = study.cases(router, None) + (study.cases(router, held) if held else [])
    calibration = fit_gates(cases, content.calibration.blend)
    return dataclasses.replace(content, calibration=calibration)
