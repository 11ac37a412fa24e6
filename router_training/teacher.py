"""Labels for prompts without any: what each adapter adds to the likelihood of the right answer.

p_i is proportional to exp(gain_i / T), where gain_i is the log-likelihood of a row's answer under
adapter i at weight 1 less that under the base alone. The base takes part with a gain of 0, so a
row that no adapter helps has no label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mora_serve.model.decoder import Decoder
from mora_serve.model.stacked import StackedAdapters
from router_training.batched import Log, trained_through
from router_training.batches import TokenRow, chunks
from router_training.discovered import measure_losses

Array = npt.NDArray[np.float64]

PERPLEXITY = 1.05  # of a row's p, in the mean over rows, where T is chosen
THRESHOLD = 0.5
LOGGED = 128  # rows between two lines of progress
_LEAST, _MOST = 1e-3, 1e3  # T in nats


def likelihood_gains(
    decoder: Decoder, adapters: StackedAdapters, rows: Sequence[TokenRow], log: Log | None = None
) -> Array:
    """Gains [rows, adapters] in nats for whole answers."""
    decoder = trained_through(decoder)
    gains = np.zeros((len(rows), adapters.count))
    done = 0
    for part in chunks(sorted(range(len(rows)), key=lambda n: len(rows[n])), LOGGED):
        own = [rows[n] for n in part]
        losses = measure_losses(decoder, adapters, own, [None, *range(adapters.count)])
        tokens = np.array([len(row.answer) for row in own])
        gains[list(part)] = (losses[:, :1] - losses[:, 1:]) * tokens[:, None]
        done += len(part)
        if log is not None:
            log(f"teacher {done}/{len(rows)} rows")
    return gains


def responsibilities(gains: Array, temperature: float) -> Array:
    """p [rows, adapters + 1], the base last; rows sum to 1."""
    scaled = np.column_stack((gains, np.zeros(len(gains)))) / temperature
    scaled -= scaled.max(1, keepdims=True)
    p = np.exp(scaled)
    out: Array = p / p.sum(1, keepdims=True)
    return out


def temperature_of(gains: Array, perplexity: float = PERPLEXITY) -> float:
    """The T at which exp(entropy of p) is ``perplexity`` in the mean over rows.

    Entropy grows with T; bisection between 0.001 and 1000 nats.
    """
    low, high = math.log(_LEAST), math.log(_MOST)
    for _ in range(50):
        middle = (low + high) / 2
        p = responsibilities(gains, math.exp(middle))
        entropy = -np.sum(p * np.log(np.maximum(p, 1e-300)), 1)
        low, high = (low, middle) if np.exp(entropy).mean() > perplexity else (middle, high)
    return math.exp((low + high) / 2)


def teach(
    gains: Array, names: Sequence[str], temperature: float, threshold: float = THRESHOLD
) -> list[tuple[str, ...]]:
    """For each row the adapter of the greatest p, where it helps and p reaches ``threshold``.

    One at most: p says which of them a row is from, so two that share it are alternatives and
    not a mixture.
    """
    p = responsibilities(gains, temperature)
    sure = (gains.max(1) > 0) & (p[:, :-1].max(1) >= threshold)
    best = gains.argmax(1)
    return [(names[i],) if one else () for i, one in zip(best, sure, strict=True)]
