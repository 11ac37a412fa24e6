"""What is known of a call before its servicer runs: whose it is and how it is named."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from mora_serve.access.audit import Audit
from mora_serve.access.door import Caller
from mora_serve.config import Config

REQUEST_ID = "mora-request-id"

_PARENT = ("traceparent", "tracestate")
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Call:
    """One call: ``request_id`` is echoed to the client, ``caller`` is who makes it.

    ``counts`` are for the line of the log that tells of its end. ``parent`` is what the caller
    says of the trace that the call is a part of, by W3C's names.
    """

    request_id: str
    caller: Caller = field(default_factory=Caller)
    counts: dict[str, int] = field(default_factory=dict, compare=False)
    parent: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def tenant(self) -> str:
        """Whose adapters the call names."""
        return self.caller.tenant


# Set by the interceptor in the task of each call, so every call sees its own.
_current: ContextVar[Call] = ContextVar("mora_serve_call")


def current() -> Call:
    """The call that this task serves."""
    return _current.get()


def found() -> Call | None:
    """The call that this task serves, or None where it serves none."""
    return _current.get(None)


def enter(call: Call) -> None:
    """Make ``call`` this task's."""
    _current.set(call)


def record(audit: Audit, event: str, **more: Any) -> None:
    """Write what the call has done to the audit log."""
    call = current()
    audit.record(event, request_id=call.request_id, tenant=call.tenant, key=call.caller.key, **more)


def root_of(config: Config) -> str:
    """The directory that the call may name paths under; empty for none.

    Where keys tell tenants apart, each has a directory of its own under the adapter root.
    """
    root = config.adapters.root
    return os.path.join(root, current().tenant) if root and config.access.file else root


def parent_of(metadata: Mapping[str, str | bytes]) -> dict[str, str]:
    """What metadata, or headers, say of the trace that a call is a part of."""
    if "traceparent" not in metadata:
        return {}
    return {k: v for k in _PARENT if isinstance(v := metadata.get(k), str)}


def request_id(metadata: Iterable[tuple[str, str | bytes]]) -> tuple[str, bool]:
    """The client's id for the call, or a new one; and whether what the client sent was usable."""
    given = dict(metadata).get(REQUEST_ID)
    if isinstance(given, str) and _REQUEST_ID.fullmatch(given):
        return given, True
    return uuid.uuid4().hex, given is None
