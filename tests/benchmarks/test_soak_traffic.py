"""How the calls of a soak are judged."""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks.soak_traffic import FULL, Traffic


def test_a_server_that_refuses_everything_has_no_share_of_success(tmp_path: Path) -> None:
    """Refusals under load are right for each call alone, and for most of them no soak."""

    async def judge() -> tuple[dict[str, int], float, float]:
        traffic = Traffic("127.0.0.1:9", ["mora_x"], tmp_path, seed=0)
        traffic.ends["generate", FULL] = 9
        traffic.ends["wrong", "NOT_FOUND"] = 100
        traffic.ends["hurried", "DEADLINE_EXCEEDED"] = 100
        refused = traffic.ok_share
        traffic.ends["stream", "OK"] = 1
        traffic.ends["wrong", "OK"] = 2
        traffic.ends["route", "UNAVAILABLE"] = 3
        await traffic.close()
        return traffic.unexpected, refused, traffic.ok_share

    unexpected, refused, share = asyncio.run(judge())
    assert unexpected == {"wrong: OK": 2, "route: UNAVAILABLE": 3}
    assert refused == 0.0
    assert share == 1 / 13
