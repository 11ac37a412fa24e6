"""A learnt correction of whitened prompts, which folds into the router's projection.

z becomes z + (z U) V, of low rank and nothing at first. It is trained by gradient on known adapters
as they would be used: some prompts of each make its centre, the others have to find it, and
prompts of nobody have to find none. What that gains for known adapters it may cost those to come:
whether it stays is decided by the accuracy on adapters that were kept out (see ``fit_router``).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mora_serve.router.arrays import Floats


@dataclass(frozen=True)
class CorrectionRecipe:
    """Adam at ``lr`` for at most ``steps``, after a ``warmup`` of the loss's own scale.

    It stops when ``patience`` looks at the kept prompts, one every ``every`` steps, have seen no
    better loss. ``key_prompts`` make a centre.
    """

    rank: int = 32
    warmup: int = 40
    steps: int = 200
    every: int = 5
    patience: int = 6
    lr: float = 3e-3
    decay: float = 1e-2
    key_prompts: int = 16
    seed: int = 0


def learn_correction(
    learn: Sequence[Floats], kept: Sequence[Floats], outside: Floats, recipe: CorrectionRecipe
) -> Floats:
    """The matrix [K, K] that multiplies z, before it is normalised.

    ``learn`` and ``kept`` are adapters' prompts [n_i, K] as unit vectors, the latter for stopping
    only; ``outside`` [m, K] are prompts of nobody.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    model = _Correction(learn[0].shape[1], recipe.rank, generator)
    scale = [model.log_sharpness, model.none]
    optimizer = torch.optim.Adam(
        [
            {"params": list(model.embed.parameters()), "lr": 0.0, "weight_decay": recipe.decay},
            {"params": scale, "lr": 0.05},
        ]
    )
    own = [torch.from_numpy(np.ascontiguousarray(z)) for z in learn]
    nobody = torch.from_numpy(np.ascontiguousarray(outside))
    others = [torch.from_numpy(np.ascontiguousarray(z)) for z in kept]
    best, best_loss, worse = copy.deepcopy(model.state_dict()), float("inf"), 0
    for step in range(-recipe.warmup, recipe.steps + 1):
        # First the scale of the loss alone, so that what follows is the correction's own doing.
        optimizer.param_groups[0]["lr"] = recipe.lr if step >= 0 else 0.0
        if step >= 0 and step % recipe.every == 0:
            with torch.no_grad():
                keys = [z[: recipe.key_prompts] for z in own]
                loss = model.loss(keys, others, nobody).item()
            if loss < best_loss:
                best, best_loss, worse = copy.deepcopy(model.state_dict()), loss, 0
            else:
                worse += 1
            if worse > recipe.patience:
                break
        orders = [torch.randperm(len(z), generator=generator) for z in own]
        cuts = [min(recipe.key_prompts, len(z) // 2) for z in own]
        keys = [z[o[:n]] for z, o, n in zip(own, orders, cuts, strict=True)]
        asked = [z[o[n:]] for z, o, n in zip(own, orders, cuts, strict=True)]
        optimizer.zero_grad()
        torch.autograd.backward(model.loss(keys, asked, nobody))
        optimizer.step()
    model.load_state_dict(best)
    return model.embed.matrix()


class LowRank(nn.Module):
    """z [..., K] becomes z + (z U) V, normalised; at first it stays as it is."""

    def __init__(self, size: int, rank: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(size, rank, generator=generator) * size**-0.5)
        self.up = nn.Parameter(torch.zeros(rank, size))

    def forward(self, z: Tensor) -> Tensor:
        """z [..., K] corrected, of norm 1."""
        return F.normalize(z + z @ self.down @ self.up, dim=-1)

    @torch.no_grad()
    def matrix(self) -> Floats:
        """The matrix [K, K] that multiplies z, before it is normalised."""
        out: Floats = (torch.eye(len(self.down)) + self.down @ self.up).numpy()
        return out


class _Correction(nn.Module):
    def __init__(self, size: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.embed = LowRank(size, rank, generator)
        self.log_sharpness = nn.Parameter(torch.tensor(2.5))
        self.none = nn.Parameter(torch.tensor(0.3))  # the cosine that no adapter means

    def loss(self, keys: Sequence[Tensor], asked: Sequence[Tensor], nobody: Tensor) -> Tensor:
        """Mean cross-entropy of who is asked for: an adapter, or none; adapters count the same."""
        centres = F.normalize(torch.stack([self.embed(z).mean(0) for z in keys]), dim=-1)
        losses = []
        for right, z in enumerate([*asked, nobody]):
            if len(z):
                cosines = self.embed(z) @ centres.T
                scores = torch.cat([cosines, self.none.expand(len(z), 1)], 1)
                target = torch.full((len(z),), right)
                losses.append(F.cross_entropy(scores * self.log_sharpness.exp(), target))
        return torch.stack(losses).mean()
