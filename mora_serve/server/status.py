"""Errors as gRPC statuses: here, and nowhere else, an exception becomes one.

A ``MoraError`` is sent as it is, with machine-readable details; when to come again stands in the
metadata besides, in the form that grpc's own retry policies read.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc import aio
from grpc_status import rpc_status

from mora_serve.errors import MoraError, ResourceExhausted

DOMAIN = "mora-serve"
PUSHBACK = "grpc-retry-pushback-ms"
_LONGEST_MESSAGE = 1000  # characters; all metadata of an answer shares 8 KiB

log = logging.getLogger(__name__)

Metadata = tuple[tuple[str, str], ...]
Context = aio.ServicerContext[Any, Any]


async def abort(context: Context, error: MoraError, echo: Metadata) -> Any:
    """End a call with an error; ``echo`` is more metadata that its end carries."""
    status = rpc_status.to_status(status_of(error))
    trailing = (*status.trailing_metadata, *echo)
    left = context.time_remaining()
    if error.retry_after is not None and (left is None or error.retry_after < left):
        trailing += ((PUSHBACK, str(round(error.retry_after * 1000))),)
    elif error.retry_after is not None or isinstance(error, ResourceExhausted):
        # A client's retry policy is not to try again: the call would end by its deadline instead.
        trailing += ((PUSHBACK, "-1"),)
    try:
        return await context.abort(status.code, status.details, trailing)
    except aio.InternalError:
        log.debug("the client had gone before it could be told: %s %s", error.code, error.reason)
        raise asyncio.CancelledError from None  # or grpc would log a fault


def status_of(error: MoraError) -> status_pb2.Status:
    """The rich status of an error: ErrorInfo always, BadRequest and RetryInfo where they apply."""
    message = error.message
    if len(message) > _LONGEST_MESSAGE:
        message = message[:_LONGEST_MESSAGE] + "…"
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=message
        )
        details.append(error_details_pb2.BadRequest(field_violations=(violation,)))
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code), message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return status
