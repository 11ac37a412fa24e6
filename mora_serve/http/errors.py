"""Errors as HTTP says them: a status by one table, and OpenAI's error object.

What clients of OpenAI's make of an answer stands in its headers: ``retry-after-ms`` and
``x-should-retry`` are what the official ones read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from mora_serve.errors import Internal, InvalidArgument, MoraError, NotFound, Unimplemented

STATUS = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
# Where HTTP tells apart what gRPC does not, by the reason.
_STATUS_OF_REASON = {
    "NO_SUCH_PATH": 404,
    "METHOD_NOT_ALLOWED": 405,
    "STREAM_STALLED": 408,
    "BODY_TOO_LARGE": 413,
    "NOT_JSON": 415,
}
_TYPE = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
# Codes that clients of OpenAI's know; others are the reason in lower case.
_CODE = {
    "BAD_KEY": "invalid_api_key",
    "NO_KEY": "invalid_api_key",
    "PROMPT_TOO_LONG": "context_length_exceeded",
    "TENANT_RATE": "rate_limit_exceeded",
}
_LONGEST = 1000  # characters of a message
# Forms that a value may have: in pydantic's locations, and no part of what a field is called.
ONE, LIST, OBJECT = "<one>", "<list>", "<object>"

Headers = list[tuple[bytes, bytes]]


def status_of(error: MoraError) -> int:
    """The HTTP status of an error."""
    return _STATUS_OF_REASON.get(error.reason) or STATUS.get(error.code, 500)


def body_of(error: MoraError) -> dict[str, Any]:
    """OpenAI's error object."""
    status = status_of(error)
    message = error.message
    if len(message) > _LONGEST:
        message = message[:_LONGEST] + "…"
    code = _CODE.get(error.reason, error.reason.lower())
    if error.field == "model" and isinstance(error, NotFound):
        code = "model_not_found"
    kind = _TYPE.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": error.field or None, "code": code}}


def encoded(error: MoraError) -> bytes:
    """The error object as JSON."""
    return json.dumps(body_of(error)).encode()


def headers_of(error: MoraError) -> Headers:
    """What an error's answer says in its headers: when to come again, or that it is no use."""
    headers: Headers = [(b"content-type", b"application/json")]
    status = status_of(error)
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.retry_after is not None:
        headers += [
            (b"retry-after", str(math.ceil(error.retry_after)).encode()),
            (b"retry-after-ms", str(math.ceil(error.retry_after * 1000)).encode()),
            (b"x-should-retry", b"true"),
        ]
    elif error.code != "UNAVAILABLE":  # another server may do; with anything else it is no use
        headers.append((b"x-should-retry", b"false"))
    return headers


def no_such_path() -> Unimplemented:
    """The error for a path that is none of this server's."""
    return Unimplemented(
        "path: the server has nothing there; see /docs for what it serves", reason="NO_SUCH_PATH"
    )


def wrong_method() -> InvalidArgument:
    """The error for another HTTP method than the path's."""
    return InvalidArgument(
        "method: this path is asked by another HTTP method; see /docs", reason="METHOD_NOT_ALLOWED"
    )


def of_validation(errors: Sequence[Any]) -> InvalidArgument:
    """The first of the mistakes that pydantic found in a body."""
    first = errors[0]
    kind, message = str(first["type"]), str(first["msg"])
    if kind == "json_invalid":
        return InvalidArgument(
            "body: it is not JSON of whole characters; send a JSON object", reason="INVALID_JSON"
        )
    if kind == "model_type" and not first["loc"]:
        return InvalidArgument("body: it is no JSON object; send one")
    key = first.get("ctx", {}).get("key")
    field = field_of([*first["loc"], *([key] if key else [])])
    where = field or "body"
    if kind == "extra_forbidden":
        return InvalidArgument(
            f"{where}: it is unknown to this server; leave it out",
            field=field,
            reason="UNKNOWN_PARAMETER",
        )
    reason = kind.upper() if kind.startswith("unsupported") else "INVALID_ARGUMENT"
    return InvalidArgument(f"{where}: {message}", field=field, reason=reason)


def internal(request_id: str) -> Internal:
    """What a client learns of a fault of the server."""
    return Internal(f"internal error; the server's log has it as request {request_id}")


def field_of(location: Sequence[int | str]) -> str:
    """A place in a JSON object as people write it: ``messages[0].role``."""
    field = ""
    for part in location:
        if isinstance(part, int):
            field += f"[{part}]"
        elif part in (ONE, LIST, OBJECT):
            continue
        elif re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", part):
            field += f".{part}" if field else part
        else:
            field += ".…" if field else "…"
    return field
