"""Roles: every call is in the table, and nothing else is."""

from __future__ import annotations

from mora_serve.access.roles import ADMINISTRATIVE, ALLOWED
from mora_serve.v1 import adapters_pb2, generation_pb2, router_pb2, server_pb2

MODULES = (generation_pb2, adapters_pb2, router_pb2, server_pb2)


def test_the_table_has_exactly_the_calls_of_the_descriptors() -> None:
    methods = {
        f"/{service.full_name}/{method.name}"
        for module in MODULES
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert methods == {name for name in ALLOWED if name.startswith("/mora_serve.")}
    assert all(ALLOWED.values())


def test_what_changes_things_for_all_tenants_is_for_administrators() -> None:
    assert {name.rpartition("/")[2] for name in ADMINISTRATIVE} == {"LoadRouter", "PinAdapter"}
