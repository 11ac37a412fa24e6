"""Quantiles of a server's histograms between two looks at them."""

from __future__ import annotations

import math

import pytest
from prometheus_client import start_http_server

from benchmarks.router_scale import LAG, PACE, Histogram, scrape
from mora_serve.metrics import Metrics

BEFORE = Histogram({0.01: 5, 0.02: 5, math.inf: 6}, 0.4)
AFTER = Histogram({0.01: 5, 0.02: 13, math.inf: 16}, 1.4)


def test_only_what_came_between_counts() -> None:
    between = AFTER - BEFORE
    assert (between.count, between.total) == (10, pytest.approx(1.0))
    assert between.mean == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("q", "value"), [(0.0, 0.01), (0.4, 0.015), (0.8, 0.02), (0.9, 0.02), (1.0, 0.02)]
)
def test_a_quantile_lies_within_its_bucket(q: float, value: float) -> None:
    """Beyond the last bound it is that bound."""
    assert (AFTER - BEFORE).quantile(q) == pytest.approx(value)


def test_the_servers_histograms_are_read() -> None:
    metrics = Metrics("test")
    server, _ = start_http_server(0, "127.0.0.1", metrics.registry)
    try:
        url = f"http://127.0.0.1:{server.server_port}/metrics"
        before = scrape(url)
        metrics.lag(0.015)
        metrics.tokens(2, 0.2)
        after = {name: h - before[name] for name, h in scrape(url).items()}
    finally:
        server.shutdown()
        server.server_close()
    lag, pace = after[LAG], after[PACE]
    assert (lag.count, lag.mean) == (1, pytest.approx(0.015))
    assert 0.0125 <= lag.quantile(0.99) <= 0.015
    assert (pace.count, pace.mean) == (2, pytest.approx(0.1))
