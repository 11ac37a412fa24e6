"""Every error a caller can see: a gRPC code by name, a machine-readable reason, a message.

A message names the field, the value and the remedy, and never a path, an address or a
traceback. The one place that turns these into a gRPC status is ``server/status.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self


class MoraError(Exception):
    """Base of all errors that are the caller's to handle.

    ``code`` is the name of a gRPC status code, ``reason`` an UPPER_SNAKE identifier that is
    stable across releases, ``field`` the request field at fault (empty when none is),
    ``retry_after`` a hint in seconds (None when a retry is pointless).
    """

    code = "UNKNOWN"
    reason = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        reason: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after = retry_after
        if reason is not None:
            self.reason = reason

    def at(self, field: str) -> Self:
        """The same error, its field under the name that it has in the whole request."""
        message = f"{field}: {self.message.partition(': ')[2]}"
        return type(self)(message, field=field, reason=self.reason, retry_after=self.retry_after)


class InvalidArgument(MoraError):
    """The request itself is wrong, whatever the state of the server."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_ARGUMENT"


class NotFound(MoraError):
    """An adapter, task or version that the caller may see does not exist."""

    code = "NOT_FOUND"
    reason = "NOT_FOUND"


class AlreadyExists(MoraError):
    """The name is in use by other content and ``replace`` was not set."""

    code = "ALREADY_EXISTS"
    reason = "ALREADY_EXISTS"


class FailedPrecondition(MoraError):
    """The request is sound but the server is not in a state to serve it."""

    code = "FAILED_PRECONDITION"
    reason = "FAILED_PRECONDITION"


class ResourceExhausted(MoraError):
    """A queue, a quota or a memory limit is full; a retry may succeed."""

    code = "RESOURCE_EXHAUSTED"
    reason = "RESOURCE_EXHAUSTED"


class DeadlineExceeded(MoraError):
    """The deadline passed before the answer was complete."""

    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class Unauthenticated(MoraError):
    """The call needs a key that is valid."""

    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class PermissionDenied(MoraError):
    """The caller may not use what it named."""

    code = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"


class Unavailable(MoraError):
    """The server is loading or draining, or what it stands on does not answer."""

    code = "UNAVAILABLE"
    reason = "UNAVAILABLE"


class Unimplemented(MoraError):
    """The server has no such method."""

    code = "UNIMPLEMENTED"
    reason = "UNIMPLEMENTED"


class Internal(MoraError):
    """A fault of the server; the message carries nothing but a request id."""

    code = "INTERNAL"
    reason = "INTERNAL"


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as a message between threads or processes: plain values, made an error again."""

    code: str
    reason: str
    message: str
    field: str = ""
    retry_after: float | None = None

    @classmethod
    def of(cls, error: MoraError) -> Failure:
        """What an error says."""
        return cls(error.code, error.reason, error.message, error.field, error.retry_after)

    def error(self) -> MoraError:
        """The error of this code."""
        return class_of(self.code)(
            self.message, field=self.field, reason=self.reason, retry_after=self.retry_after
        )


def class_of(code: str) -> type[MoraError]:
    """The error class of a gRPC status code's name; MoraError for a code without one."""
    return next((c for c in MoraError.__subclasses__() if c.code == code), MoraError)


class ConfigError(MoraError):
    """The configuration is wrong: an unknown key, a value out of range, an unsupported base."""

    code = "FAILED_PRECONDITION"
    reason = "CONFIG"
