"""What is known of a call before its servicer runs: whose it is and how it is named."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field

from mora_serve.adapters.untrusted import check_name
from mora_serve.core import DEFAULT_TENANT

REQUEST_ID = "mora-request-id"
TENANT = "mora-tenant"

_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Call:
    """One call: ``request_id`` is echoed to the client, ``tenant`` owns the adapters it names.

    ``counts`` are for the line of the log that tells of its end.
    """

    request_id: str
    tenant: str = DEFAULT_TENANT
    counts: dict[str, int] = field(default_factory=dict, compare=False)


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


def request_id(metadata: Iterable[tuple[str, str | bytes]]) -> tuple[str, bool]:
    """The client's id for the call, or a new one; and whether what the client sent was usable."""
    given = dict(metadata).get(REQUEST_ID)
    if isinstance(given, str) and _REQUEST_ID.fullmatch(given):
        return given, True
    return uuid.uuid4().hex, given is None


def tenant(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The tenant that the client names, or the default one. InvalidArgument for a bad name."""
    return check_name(str(dict(metadata).get(TENANT, DEFAULT_TENANT)), TENANT)
