"""Where a new adapter can start from: chance, one adapter of a shared set, or the set's mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mora_serve.errors import InvalidArgument
from mora_serve.model.stacked import StackedAdapters

Start = int | Literal["random", "mean"]
"""An index is that of one of the set's adapters."""


def begin(adapters: StackedAdapters, place: int, shared: StackedAdapters, start: Start) -> None:
    """Put a start in the place of one adapter; "random" leaves what is there.

    Raises InvalidArgument where the set lacks a target of ``adapters``.
    """
    if start != "random":
        indices = range(shared.count) if start == "mean" else [start]
        copy_mean(shared, indices, adapters, place)


@torch.no_grad()
def copy_mean(
    shared: StackedAdapters, indices: Sequence[int], adapters: StackedAdapters, place: int = 0
) -> None:
    """Make the adapter at ``place`` the mean of some of a set's deltas s B A.

    At each projection it is the best approximation of its rank (Eckart-Young). Ranks that the
    mean does not fill keep their A, and a B of zero, so that they can still learn.

    Raises InvalidArgument where the set lacks a target of ``adapters``.
    """
    missing = sorted(set(adapters.targets) - set(shared.targets))
    if missing:
        raise InvalidArgument(
            f"targets: the shared set lacks {', '.join(missing)}; choose among its own",
            field="targets",
        )
    factor = shared.alpha / shared.rank / len(indices) / (adapters.alpha / adapters.rank)
    for layer in range(adapters.shape.layers):
        for projection in adapters.targets:
            parts = [shared.projection(layer, projection, i) for i in indices]
            scales = [1.0 if shared.scales is None else shared.scales[i, layer] for i in indices]
            a, b = low_rank(
                torch.cat([a for a, _ in parts]),
                torch.cat([b * scale for (_, b), scale in zip(parts, scales, strict=True)]),
                adapters.rank,
            )
            own_a, own_b = adapters.projection(layer, projection, place)
            own_a[: len(a)] = a
            own_b.zero_()[: len(b)] = b * factor


def low_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [r, out], r <= ``rank``, with B.T A nearest to b.T a; a [n, in], b [n, out].

    A and B share the singular values alike; r is less than ``rank`` where b.T a has no more.
    Nothing of the size in x out is decomposed: QR of both first.
    """
    q_in, r_in = torch.linalg.qr(a.T)
    q_out, r_out = torch.linalg.qr(b.T)
    u, values, v = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    kept = min(rank, int((values > 1e-6 * values[0]).sum()))
    root = values[:kept].sqrt()[:, None]
    return root * (v[:kept] @ q_in.T), root * (q_out @ u[:, :kept]).T
