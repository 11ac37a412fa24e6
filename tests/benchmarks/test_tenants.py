"""``benchmarks.tenants``: two tenants asked at the same time, every answer checked."""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks import tenants


def test_nothing_of_one_tenant_reaches_the_other(tmp_path: Path) -> None:
    result = asyncio.run(tenants.measure(tmp_path, 120, 300.0, seed=1))
    assert result["leaks"] == []
    assert result["requests"] == 120
    assert result["kinds"].keys() >= {"mixture", "task", "auto", "foreign", "route", "get"}
    assert result["asked_alone"] == result["answers"] > 30
