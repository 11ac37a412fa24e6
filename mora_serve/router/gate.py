"""The gates: from evidence to the probability that an adapter is right for a prompt.

Probabilities are independent and need not sum to one: several adapters may be right together.
"""

from __future__ import annotations

import numpy as np

from mora_serve.router.arrays import Floats
from mora_serve.router.evidence import Evidence
from mora_serve.router.format import Calibration, Gate


def probabilities(seen: Evidence, calibration: Calibration) -> Floats:
    """How likely each candidate is right [n]."""
    first = opened(calibration.first, seen.first[None])
    return np.concatenate((first, opened(calibration.further, seen.further)))


def opened(gate: Gate, inputs: Floats) -> Floats:
    """σ(inputs [n, m] · weights + bias) [n], never overflowing."""
    logit = (inputs.astype(np.float64) * gate.weights).sum(1) + gate.bias
    probability: Floats = (0.5 * (1 + np.tanh(0.5 * logit))).astype(np.float32)
    return probability
