"""How far off a deadline has to lie: learnt from how much later than foretold requests have ended.

A request that ends too late has cost as much as one in time, and nobody has anything of it. How
good the forecast is depends on what else the machine does, so no fixed margin is right.
"""

from __future__ import annotations

LATE = 0.05  # of requests may end later than their foretold time times the margin
GAIN = 0.05  # weight of the newest request; the steps of a quantile's stochastic approximation
LEAST, MOST = 1.1, 3.0


class Margin:
    """``value`` is how many times the foretold time all but ``LATE`` of the requests take."""

    def __init__(self) -> None:
        self.value = LEAST

    def ended(self, foretold: float, seconds: float) -> None:
        """A request that was to take ``foretold`` seconds took ``seconds``."""
        self._learn(seconds > self.value * foretold)

    def missed(self) -> None:
        """A request was given up because its deadline was out of reach, or had passed."""
        self._learn(True)

    def _learn(self, late: bool) -> None:
        self.value = min(MOST, max(LEAST, self.value + GAIN * (late - LATE)))
