"""A server's metrics, as Prometheus reads them."""

from __future__ import annotations

import urllib.request
from typing import Any

from prometheus_client.parser import text_string_to_metric_families


def samples(port: int) -> list[Any]:
    """All samples: each has a name, labels and a value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return [s for family in text_string_to_metric_families(text) for s in family.samples]


def totals(port: int) -> dict[str, float]:
    """Values by name, those with labels added up; one that the server has not is a KeyError."""
    found: dict[str, float] = {}
    for sample in samples(port):
        found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def ended(port: int, *codes: str) -> int:
    """Calls that have ended with one of these codes, as the server counts them."""
    return int(
        sum(
            s.value
            for s in samples(port)
            if s.name == "mora_grpc_requests_total" and s.labels["code"] in codes
        )
    )
