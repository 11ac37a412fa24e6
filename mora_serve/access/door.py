"""Whether a caller may make a call: decided from its metadata, before anything of it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mora_serve.access.file import AccessFile
from mora_serve.access.keys import bearer
from mora_serve.access.limits import Limits
from mora_serve.access.roles import ADMINISTRATIVE, ALLOWED
from mora_serve.adapters.untrusted import check_name
from mora_serve.config import AccessConfig
from mora_serve.core import DEFAULT_TENANT
from mora_serve.errors import PermissionDenied, Unauthenticated

TENANT = "mora-tenant"
HEALTH = "/grpc.health.v1.Health/"  # what a load balancer asks, without a key


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call: whose adapters it uses, and by which key (empty without an access file)."""

    tenant: str = DEFAULT_TENANT
    key: str = ""
    limits: Limits = field(default_factory=Limits)


class Door:
    """Lets calls in.

    Without an access file everybody is let in, as the tenant that the metadata names: such a
    server is for one machine, or stands behind a proxy that decides.

    Raises ConfigError for an access file that cannot be used.
    """

    def __init__(self, config: AccessConfig) -> None:
        self._file = AccessFile(Path(config.file)) if config.file else None

    @property
    def locked(self) -> bool:
        """Whether a key is needed."""
        return self._file is not None

    def admit(self, method: str, metadata: Mapping[str, str | bytes], apart: bool) -> Caller:
        """The caller of a method that is served here; ``apart``: administration is elsewhere.

        Raises Unauthenticated without a valid key, PermissionDenied for one that may not do this,
        and InvalidArgument for a tenant's name that cannot be one.
        """
        if self._file is None:
            caller = Caller(check_name(str(metadata.get(TENANT, DEFAULT_TENANT)), TENANT))
            return _at_its_address(method, caller, apart)
        rules = self._file.rules
        secret = bearer(metadata)
        if secret is None:
            raise Unauthenticated(
                "authorization: the call has no key; send it as metadata "
                "'authorization: Bearer KEY'",
                field="authorization",
                reason="NO_KEY",
            )
        key = rules.keys.find(secret)
        if key is None or key.expired:
            # The same for a key that never was, one that was withdrawn, and one that is over.
            raise Unauthenticated(
                "authorization: the key is not valid (any more); ask the operator for another",
                field="authorization",
                reason="BAD_KEY",
            )
        caller = Caller(key.tenant, key.id, rules.limits_of(key.tenant))
        allowed = ALLOWED.get(method, frozenset())
        if not allowed & key.roles:
            roles = " or ".join(sorted(role.value for role in allowed))
            remedy = f"it takes the role {roles}" if roles else "no role allows it"
            raise Denied(
                caller, f"method: key {key.id!r} may not call it; {remedy}", reason="WRONG_ROLE"
            )
        named = str(metadata.get(TENANT, key.tenant))
        if named != key.tenant:
            raise Denied(
                caller,
                f"{TENANT}: key {key.id!r} belongs to another tenant than the one named; leave it "
                "out",
                field=TENANT,
                reason="WRONG_TENANT",
            )
        return _at_its_address(method, caller, apart)


class Denied(PermissionDenied):
    """PermissionDenied for a caller who is known."""

    def __init__(self, caller: Caller, message: str, *, field: str = "", reason: str = "") -> None:
        super().__init__(message, field=field, reason=reason or None)
        self.caller = caller


def _at_its_address(method: str, caller: Caller, apart: bool) -> Caller:
    if apart and method in ADMINISTRATIVE:
        raise Denied(
            caller,
            "method: it is not served on this address; call it on the administrators' one",
            reason="ADMIN_ADDRESS",
        )
    return caller
