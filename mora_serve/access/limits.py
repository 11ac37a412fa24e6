"""What one tenant may take: calls at the same time and a second, adapters and their bytes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mora_serve.errors import ResourceExhausted

_FORGET = 1024  # tenants whose buckets are kept before idle ones are dropped


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a tenant; None where there is none. ``burst`` 0 or None is one second's worth of calls."""

    concurrency: int | None = None
    requests_per_second: float | None = None
    burst: int | None = None
    adapters: int | None = None
    bytes: int | None = None


@dataclass(slots=True)
class _Use:
    inside: int = 0
    tokens: float = 0.0
    filled: float = 0.0  # when; 0 for never


class Meter:
    """Counts what tenants use; lives on the event loop.

    The rate is a token bucket: it holds ``burst`` calls and gains ``requests_per_second``.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._uses: dict[str, _Use] = {}

    @contextlib.contextmanager
    def passing(self, tenant: str, limits: Limits) -> Iterator[None]:
        """A call of the tenant. Raises ResourceExhausted beyond its limits."""
        if limits.concurrency is None and limits.requests_per_second is None:
            yield
            return
        use = self._uses.get(tenant)
        if use is None:
            self._forget()
            use = self._uses[tenant] = _Use()
        if limits.concurrency is not None and use.inside >= limits.concurrency:
            raise ResourceExhausted(
                f"tenant: it has {use.inside} calls running, as many as its limit allows; send the "
                "next one when one has ended",
                reason="TENANT_CONCURRENCY",
                retry_after=1.0,
            )
        self._take(use, limits)
        use.inside += 1
        try:
            yield
        finally:
            use.inside -= 1

    def _take(self, use: _Use, limits: Limits) -> None:
        rate = limits.requests_per_second
        if rate is None:
            return
        most, now = max(float(limits.burst or rate), 1.0), self._clock()
        gained = (now - use.filled) * rate if use.filled else most
        use.tokens, use.filled = min(most, use.tokens + gained), now
        if use.tokens < 1:
            wait = (1 - use.tokens) / rate if rate else 60.0
            raise ResourceExhausted(
                f"tenant: it has sent more than {rate:g} calls a second; send the next one in "
                f"{wait:.3g} s",
                reason="TENANT_RATE",
                retry_after=min(wait, 60.0),
            )
        use.tokens -= 1

    def _forget(self) -> None:
        """Those whose buckets are full again by now, at the latest after a minute's rest."""
        if len(self._uses) < _FORGET:
            return
        now = self._clock()
        for tenant, use in list(self._uses.items()):
            if not use.inside and now - use.filled > 60:
                del self._uses[tenant]
