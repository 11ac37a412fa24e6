"""Every RPC with bad input: the right code, a message with field and remedy, and life goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.bad_input_cases import (
    CASES,
    LIMITS,
    MESSAGE_BYTES,
    failure,
    request_of,
    spoil,
    works,
    wrong,
)
from benchmarks.rpcs import METHODS
from mora_serve import errors
from mora_serve.server.services import SERVICES
from tests.server.conftest import Running, configuration, running_with


@pytest.fixture(scope="module")
def bad_root(root: Path) -> Path:
    """Directories under the adapter root that must not become adapters."""
    spoil(root / "adapters", good="rev")
    return root


@pytest.fixture(scope="module")
def strict(bad_root: Path) -> Iterator[Running]:
    """A server with rev and sum, which no case may change."""
    with running_with(configuration(bad_root, **LIMITS), "rev", "sum") as serving:
        yield serving


def test_every_rpc_has_its_cases():
    """Nothing that is served is left out below."""
    assert {m.containing_service.full_name for m in METHODS.values()} == set(SERVICES)
    assert CASES.keys() == METHODS.keys()


@pytest.mark.parametrize(
    ("rpc", "case"), [(rpc, case) for rpc, cases in CASES.items() for case in cases]
)
def test_bad_input_is_explained(strict, bad_root, rpc, case):
    with strict.client() as client:
        assert wrong(client, rpc, case, bad_root) == []


@pytest.mark.parametrize("rpc", METHODS)
class TestEveryRpc:
    def test_bytes_that_are_no_message(self, strict, rpc):
        with strict.client() as client:
            error = failure(client, METHODS[rpc], b"\xff\xff\xff\xff")
            assert isinstance(error, errors.InvalidArgument)
            assert works(client)

    def test_a_tenant_that_cannot_be(self, strict, rpc):
        with strict.client() as client:
            method = METHODS[rpc]
            metadata = [("mora-tenant", "A/../B")]
            error = failure(client, method, request_of(method, {}), metadata=metadata)
            assert isinstance(error, errors.InvalidArgument)
            assert error.field == "mora-tenant"
            assert works(client)

    def test_a_message_beyond_the_limit(self, strict, rpc):
        """Refused by grpc before it is read; the server goes on."""
        with strict.client() as client:
            error = failure(client, METHODS[rpc], b"x" * (MESSAGE_BYTES + 1))
            assert isinstance(error, errors.ResourceExhausted)
            assert works(client)
