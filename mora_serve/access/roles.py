"""Roles, and the calls that each of them may make; a call that is not listed is denied."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping


class Role(enum.Enum):
    """What a key is for. None includes another; a key may have several."""

    GENERATE = "generate"
    REGISTER = "register"
    ADMIN = "admin"


def _calls(service: str, calls: Iterable[str], *roles: Role) -> dict[str, frozenset[Role]]:
    return {f"/mora_serve.v1.{service}/{call}": frozenset(roles) for call in calls}


_GRPC: Mapping[str, frozenset[Role]] = {
    **_calls("GenerationService", ("Generate", "GenerateStream"), Role.GENERATE),
    **_calls("RouterService", ("Route",), Role.GENERATE),
    **_calls(
        "AdapterService",
        ("RegisterAdapter", "UploadAdapter", "UpdateAdapter", "UnregisterAdapter"),
        Role.REGISTER,
    ),
    **_calls("RouterService", ("ExportFeedback",), Role.REGISTER),
    **_calls("AdapterService", ("ListAdapters", "GetAdapter"), *Role),
    **_calls("RouterService", ("GetRouter",), *Role),
    **_calls("ServerService", ("GetServerInfo",), *Role),
    **_calls("AdapterService", ("PinAdapter",), Role.ADMIN),
    **_calls("RouterService", ("LoadRouter",), Role.ADMIN),
    # Reflection tells what is in the public .proto files, to whoever has a key.
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": frozenset(Role),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": frozenset(Role),
}

# Paths of the HTTP API, as they are declared.
_HTTP: Mapping[str, frozenset[Role]] = {
    "/v1/chat/completions": frozenset({Role.GENERATE}),
    "/v1/completions": frozenset({Role.GENERATE}),
    "/v1/models": frozenset(Role),
    "/v1/models/{model:path}": frozenset(Role),
    "/console/map": frozenset({Role.GENERATE}),
    "/metrics": frozenset({Role.ADMIN}),  # names adapters of all tenants
}

ALLOWED: Mapping[str, frozenset[Role]] = {**_GRPC, **_HTTP}

# Calls whose effect is on all tenants; they have an address of their own where one is configured.
ADMINISTRATIVE = frozenset(
    method for method, roles in _GRPC.items() if roles == frozenset({Role.ADMIN})
)
