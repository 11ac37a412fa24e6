"""Whether the adapter product's launches shall overlap on this card: by measurement, at start.

With programmatic dependent launch a kernel begins while the one ahead of it ends. It saves some of
the time between launches, a hundred and more of which a step has; whether it does, and gives the
same bits, is seen on the card itself before anything relies on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from triton.errors import TritonError

from mora_serve.model.kernels.mixed_lora import KernelAdapters, Slots
from mora_serve.model.kernels.mixtures import MixtureBuffers

log = logging.getLogger(__name__)

CAPABILITY = (9, 0)  # from which on cards have it
ROWS, LAYERS = 16, 4  # that are tried
TURNS = 20  # whose results are compared: an overlap that is wrong need not be so each time

Seconds = Callable[[Callable[[], object]], float]


def overlap_pays(slots: Slots, seconds: Seconds) -> bool:
    """Whether overlapping launches are right and faster here; ``slots`` are empty before and after.

    ``seconds`` runs its argument and says how long that took.
    """
    if slots.device.type != "cuda" or torch.cuda.get_device_capability(slots.device) < CAPABILITY:
        return False
    try:
        return tried(slots, seconds)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TritonError) as e:
        log.info("launches of the adapter product do not overlap: %s", e)
        return False


def tried(slots: Slots, seconds: Seconds) -> bool:
    """Both kinds of launches on ROWS rows of random adapters: equal bits, and in less time."""
    count, device = min(ROWS, len(slots.ranks)), slots.device
    generator = torch.Generator(device=device).manual_seed(0)
    with _random_adapters(slots, count, generator) as parts:
        buffers = MixtureBuffers(ROWS, 1, len(slots.ranks), device)
        tensors = {}
        for site, of_site in parts[0].items():
            columns, width = of_site[0].a.shape[2], sum(p.b.shape[2] for p in of_site)
            x, y = (
                torch.randn(ROWS, n, generator=generator, device=device).to(slots.dtype)
                for n in (columns, width)
            )
            tensors[site] = x, y, y.clone()

        def work(adapters: KernelAdapters) -> None:
            for layer in range(len(parts)):
                for site, (x, y, out) in tensors.items():
                    out.copy_(y)  # where a step has the product of the base
                    adapters.apply(layer, site, x, out)

        took: dict[bool, float] = {}
        results: list[list[torch.Tensor]] = []
        for early in (False, True):
            adapters = KernelAdapters(slots, buffers, early)
            adapters.fill([((row % count, 1.0),) for row in range(ROWS)], [1] * ROWS)
            for _ in range(TURNS):
                work(adapters)
                results.append([out.clone() for _, _, out in tensors.values()])
            took[early] = seconds(lambda adapters=adapters: work(adapters))  # type: ignore[misc]
            results.append([out.clone() for _, _, out in tensors.values()])
        same = all(all(map(torch.equal, result, results[0])) for result in results)
        log.info(
            "launches of the adapter product: %.1f us, overlapping %.1f us%s",
            *(1e6 * took[early] for early in (False, True)),
            "" if same else ", but with other results",
        )
        return same and took[True] < took[False]


@contextmanager
def _random_adapters(
    slots: Slots, count: int, generator: torch.Generator
) -> Iterator[Sequence[dict[str, tuple[Any, ...]]]]:
    """The first layers' parts while their first slots hold something; empty again afterwards.

    Raises ValueError where a slot is in use.
    """
    if any(slots.ranks):
        raise ValueError("there are adapters in the slots")
    parts = [dict(sites) for sites in slots.layers[:LAYERS]]
    held = [part for sites in parts for of_site in sites.values() for part in of_site]
    try:
        for part in held:
            for name in ("a", "b", "scale"):
                tensor = getattr(part, name, None)
                if tensor is None:
                    continue
                if tensor.is_floating_point():
                    tensor[:count].uniform_(-0.1, 0.1, generator=generator)
                else:
                    tensor[:count].random_(-127, 128, generator=generator)
        slots.ranks[:count] = [slots.max_rank] * count
        yield parts
    finally:
        slots.ranks[:count] = [0] * count
        for part in held:
            for name in ("a", "b", "scale"):
                if hasattr(part, name):
                    getattr(part, name)[:count] = 0
