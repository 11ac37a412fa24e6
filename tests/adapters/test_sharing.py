"""Shared adapters: everybody may use them, only their owner may change them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.adapters.record import AdapterRecord, Quota, State
from mora_serve.adapters.registry import Registry
from mora_serve.core import SHARED_TENANT
from mora_serve.errors import NotFound, PermissionDenied, ResourceExhausted
from tests.adapters.make import LIMITS, SHAPE, adapter


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "state", LIMITS, SHAPE) as registry:
        for i, (tenant, name, tasks) in enumerate(
            (
                (SHARED_TENANT, "echo", ["t"]),
                (SHARED_TENANT, "both", ["t", "u"]),
                ("one", "both", ["v"]),
                ("one", "mine", ["t"]),
            )
        ):
            registry.register(tenant, name, adapter(i), tasks=tasks)
        yield registry


def names(records: tuple[AdapterRecord, ...]) -> list[tuple[str, str]]:
    return [(r.name, r.tenant) for r in records]


def test_a_tenant_uses_its_own_and_the_shared_ones(registry: Registry) -> None:
    assert names(registry.list("one")) == [("both", "one"), ("echo", "shared"), ("mine", "one")]
    assert names(registry.list("two")) == [("both", "shared"), ("echo", "shared")]
    assert names(registry.list("shared")) == [("both", "shared"), ("echo", "shared")]
    assert registry.get("two", "echo") == registry.get("shared", "echo")
    assert registry.get("one", "both").tenant == "one"


def test_a_task_finds_shared_adapters_unless_their_name_is_taken(registry: Registry) -> None:
    assert names(registry.by_task("one", "t")) == [("echo", "shared"), ("mine", "one")]
    assert names(registry.by_task("two", "t")) == [("both", "shared"), ("echo", "shared")]
    assert registry.tasks("one") == ("t", "v")
    with pytest.raises(NotFound):
        registry.by_task("one", "u")


def test_only_its_owner_changes_a_shared_adapter(registry: Registry) -> None:
    for change in (
        lambda tenant: registry.update(tenant, "echo", tasks=["x"]),
        lambda tenant: registry.pin(tenant, "echo", True),
        lambda tenant: registry.unregister(tenant, "echo"),
    ):
        with pytest.raises(PermissionDenied, match="'echo' is shared") as caught:
            change("one")
        assert caught.value.reason == "SHARED_ADAPTER"
        assert registry.get("two", "echo").tasks == ("t",) or change
    registry.unregister(SHARED_TENANT, "echo")
    with pytest.raises(NotFound):
        registry.get("one", "echo")


def test_removing_ones_own_adapter_brings_the_shared_one_back(registry: Registry) -> None:
    registry.unregister("one", "both")
    assert registry.get("one", "both").tenant == SHARED_TENANT


def test_no_error_tells_of_another_tenants_adapters(registry: Registry) -> None:
    with pytest.raises(NotFound) as caught:
        registry.get("two", "mine")
    unknown = caught.value.message
    registry.unregister("one", "mine")
    with pytest.raises(NotFound) as caught:
        registry.get("two", "mine")
    assert caught.value.message == unknown


def test_a_quota_counts_the_tenants_own_adapters_alone(registry: Registry) -> None:
    quota = Quota(adapters=2)
    with pytest.raises(ResourceExhausted) as caught:
        registry.register("one", "third", adapter(9), quota=quota)
    assert caught.value.reason == "TENANT_ADAPTERS"
    registry.register("one", "mine", adapter(9), replace=True, quota=quota)
    registry.register("two", "first", adapter(9), quota=quota)
    size = registry.get("two", "first").nbytes
    registry.register("two", "second", adapter(10), quota=Quota(nbytes=2 * size))
    with pytest.raises(ResourceExhausted, match=f"{3 * size} bytes") as caught:
        registry.register("two", "third", adapter(11), quota=Quota(nbytes=2 * size))
    assert caught.value.reason == "TENANT_BYTES"


@given(
    st.sets(st.tuples(st.sampled_from(["a", "b", "shared"]), st.sampled_from("pqrs")), max_size=12),
    st.sampled_from(["a", "b", "c", "shared"]),
)
def test_what_is_visible_is_what_can_be_found(keys: set[tuple[str, str]], tenant: str) -> None:
    def record(owner: str, name: str) -> AdapterRecord:
        made = adapter(0)
        return AdapterRecord(owner, name, 1, made.digest, 1, False, False, (), 1, made.nbytes, 0.0)

    state = State.of(1, [record(*key) for key in keys], None)
    found = {name: state.find(tenant, name) for name in "pqrs"}
    visible = state.visible(tenant)
    assert [r.name for r in visible] == sorted(n for n, r in found.items() if r is not None)
    assert all(found[r.name] == r for r in visible)
    assert all(r.tenant in (tenant, SHARED_TENANT) for r in visible)
