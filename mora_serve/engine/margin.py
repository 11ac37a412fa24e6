"""How far off a deadline has to lie: learnt from how much later than foretold requests have ended.

A request that ends too late has cost as much as one in time, and nobody has anything of it. How
good the forecast is depends on what else the machine does, so no fixed margin is right.
"""

from __future__ import annotations

from collections import OrderedDict

LATE = 0.05  # of requests may end later than their foretold time times the margin
GAIN = 0.05  # weight of the newest request; the steps of a quantile's stochastic approximation
LEAST, MOST = 1.1, 3.0


TENANTS = 1024  # whose margins are kept; those that ended nothing for longest begin anew


class Margins:
    """A margin for each tenant: what one's requests teach moves nobody else's deadlines."""

    def __init__(self) -> None:
        self._by_tenant: OrderedDict[str, Margin] = OrderedDict()

    def value(self, tenant: str) -> float:
        """A tenant's margin."""
        margin = self._by_tenant.get(tenant)
        return LEAST if margin is None else margin.value

    def learning(self, tenant: str) -> Margin:
        """A tenant's margin, to be told how a request of its ended."""
        margin = self._by_tenant.pop(tenant, None) or Margin()
        self._by_tenant[tenant] = margin
        if len(self._by_tenant) > TENANTS:
            self._by_tenant.popitem(last=False)
        return margin


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
