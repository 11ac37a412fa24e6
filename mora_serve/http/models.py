"""What ``model`` can be, as OpenAI's API lists it."""

from __future__ import annotations

from typing import Any

from mora_serve.adapters.record import AdapterRecord
from mora_serve.adapters.registry import Registry
from mora_serve.core import SHARED_TENANT
from mora_serve.errors import MoraError
from mora_serve.http.asking import AUTO, BASE


def listed(registry: Registry, base: str, tenant: str) -> list[dict[str, Any]]:
    """The base, the router, and the adapters that a tenant may use."""
    own = (_adapter(r) for r in registry.served(tenant) if r.name not in (AUTO, BASE, base))
    return [_base(base), _router(), *own]


def described(registry: Registry, base: str, tenant: str, model: str) -> dict[str, Any]:
    """One of them. Raises NotFound, with the nearest names that the tenant may use."""
    if model in (BASE, base):
        return _base(model)
    if model == AUTO:
        return _router()
    try:
        return _adapter(registry.get(tenant, model))
    except MoraError as e:
        raise e.at("model") from None


def _base(name: str) -> dict[str, Any]:
    return _object(name, 0, "mora-serve", {"kind": "base"})


def _router() -> dict[str, Any]:
    return _object(AUTO, 0, "mora-serve", {"kind": "router"})


def _adapter(record: AdapterRecord) -> dict[str, Any]:
    owner = "shared" if record.tenant == SHARED_TENANT else "tenant"
    mora = {
        "kind": "adapter",
        "version": record.version,
        "digest": record.digest,
        "tasks": list(record.tasks),
    }
    return _object(record.name, int(record.created), owner, mora)


def _object(name: str, created: int, owner: str, mora: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": owner, "mora": mora}
