"""A registry with the demo's adapters, and a router at work on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mora_serve.adapters.registry import Registry
from mora_serve.router.routing import Routing
from tests.adapters.make import LIMITS, SHAPE, adapter
from tests.router.make import FINGERPRINT, card, fitted

ADAPTERS = ("reverse", "uppercase", "json", "polite", "roman")


@pytest.fixture
def registry() -> Iterator[Registry]:
    """Five adapters of the default tenant, and one of another that also reverses."""
    with Registry(None, LIMITS, SHAPE, FINGERPRINT) as registry:
        for i, name in enumerate(ADAPTERS):
            registry.register("default", name, adapter(i), card=card(name))
        registry.register("other", "theirs", adapter(50), card=card("reverse"))
        yield registry


@pytest.fixture
def routing(registry: Registry) -> Routing:
    routing = Routing(registry, FINGERPRINT)
    routing.load(fitted())
    return routing
