"""What a search for tasks hands over: adapters, whose the rows are, and files to serve."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mora_serve.adapters import card
from mora_serve.adapters.card import RoutingCard
from mora_serve.model.decoder import Decoder
from mora_serve.model.stacked import StackedAdapters
from mora_serve.router.features import NGrams
from router_training.batched import MixedRow, row_losses
from router_training.batches import TokenRow, chunks
from router_training.clusters import Array, Ints, TextGate
from router_training.peft_files import save_peft


@dataclass(frozen=True, slots=True)
class UnlabelledRow:
    """A row of training, and its prompt as the router will see it."""

    tokens: TokenRow
    text: str


@dataclass(frozen=True, eq=False)
class Discovered:
    """``adapters``, and which of them each row of the training is for.

    ``probabilities`` [rows, adapters] are by likelihood and prompt, ``assignment`` [rows] the
    likeliest; ``losses`` [rows, adapters] the mean cross-entropies of the answers in nats. There
    may be fewer adapters than asked for, where some would have been the same. ``start`` [rows]
    are the clusters of prompts that the search began with.
    """

    adapters: StackedAdapters
    assignment: Ints
    probabilities: Array
    losses: Array
    gate: TextGate
    features: NGrams
    start: Ints

    @property
    def names(self) -> tuple[str, ...]:
        """Names for the adapters, as nobody has given them any."""
        return tuple(f"task-{i:02}" for i in range(self.adapters.count))

    def route(self, texts: Sequence[str]) -> Array:
        """Probabilities of the adapters [texts, adapters] by the gate alone, from prompts."""
        return self.gate(self.features.dense(list(texts)).astype(np.float64))

    def examples(self, rows: Sequence[UnlabelledRow], least: float = 0.5) -> dict[str, list[str]]:
        """Distinct prompts of each adapter, for a router: its own with probability ``least``."""
        found: dict[str, dict[str, None]] = {name: {} for name in self.names}
        sure = self.probabilities.max(1) >= least
        for row, adapter, certain in zip(rows, self.assignment, sure, strict=True):
            if certain:
                found[self.names[adapter]][row.text] = None
        return {name: list(prompts) for name, prompts in found.items()}

    def card_prompts(self, rows: Sequence[UnlabelledRow], count: int = 16) -> dict[str, list[str]]:
        """At most ``count`` of the ``examples`` of each adapter, drawn by chance."""
        rng = random.Random(0)
        found = self.examples(rows)
        return {name: rng.sample(own, min(count, len(own))) for name, own in found.items()}

    def save(
        self,
        rows: Sequence[UnlabelledRow],
        directory: Path,
        fingerprint: str = "",
        base_name: str = "",
    ) -> None:
        """A PEFT directory with a routing card of example prompts for each adapter, by its name.

        ``rows`` are those of the training; ``fingerprint`` is the base's.
        """
        for index, (name, prompts) in enumerate(self.card_prompts(rows).items()):
            save_peft(self.adapters, index, directory / name, base_name)
            routing = RoutingCard("", (name,), "", tuple(prompts), fingerprint)
            (directory / name / card.FILE).write_bytes(routing.to_json() + b"\n")


def measure_losses(
    decoder: Decoder,
    adapters: StackedAdapters,
    rows: Sequence[TokenRow],
    columns: Sequence[int | None],
    size: int = 32,
) -> Array:
    """Mean cross-entropy in nats of each row's answer under each adapter [rows, columns].

    A column is an adapter's index, None the base alone.
    """
    out = np.zeros((len(rows), len(columns)))
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    with torch.no_grad():
        for part in chunks(by_length, size):
            for column, adapter in enumerate(columns):
                mixture = () if adapter is None else ((adapter, 1.0),)
                mixed = [MixedRow(rows[i], mixture) for i in part]
                out[list(part), column] = row_losses(decoder, adapters, mixed).double().numpy()
    return out
