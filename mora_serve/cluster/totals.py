"""What the engines of all replicas do, as one engine's numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields

from mora_serve.core import EngineStats
from mora_serve.metrics import COUNTERS

ABSENT = 64  # replicas that are remembered while they do not report


class Totals:
    """Gauges and digests of the replicas that report, counters of all that ever did.

    So counters never fall: Prometheus would take that for a restart, and count all of it once more.
    """

    def __init__(self) -> None:
        self._last: dict[str, EngineStats] = {}  # of each replica; who reported last is at the end
        self._gone: Counter[str] = Counter()  # counters of replicas that are forgotten

    def of(self, reports: Mapping[str, EngineStats]) -> EngineStats:
        """The sum of the newest reports, by the replicas' ids."""
        for name, report in reports.items():
            self._last.pop(name, None)
            self._last[name] = report
        while len(self._last) > len(reports) + ABSENT:
            oldest = self._last.pop(next(iter(self._last)))
            self._gone.update({field: getattr(oldest, field) for field in COUNTERS})
        values: dict[str, object] = {}
        for field in (field.name for field in fields(EngineStats)):
            if field in COUNTERS:
                known = self._last.values()
                values[field] = self._gone[field] + sum(getattr(r, field) for r in known)
                continue
            of = [getattr(report, field) for report in reports.values()]
            if of and isinstance(of[0], tuple):
                values[field] = tuple(sorted({digest for digests in of for digest in digests}))
            elif of:
                values[field] = of[0] if field == "page_size" else sum(of)
        return EngineStats(**values)  # type: ignore[arg-type]
