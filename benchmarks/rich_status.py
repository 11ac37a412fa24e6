"""What a status of gRPC carries besides its code: its rich details and the reason in them."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

DETAILS = "grpc-status-details-bin"  # the trailing metadata that has them


def status_in(details: bytes | None) -> Any:
    """The status in these bytes; None without any, or where they are none."""
    if not details:
        return None
    try:
        return status_pb2.Status.FromString(details)
    except DecodeError:
        return None


def info_in(status: Any) -> Any:
    """The ErrorInfo of a status; None where it has none."""
    info = error_details_pb2.ErrorInfo()
    return info if status is not None and any(d.Unpack(info) for d in status.details) else None


def reason_in(details: bytes | None) -> str:
    """The machine-readable reason in these bytes; empty where there is none."""
    info = info_in(status_in(details))
    return str(info.reason) if info is not None else ""


def reason_of(error: Any) -> str:
    """The reason that a failed call carries."""
    trailing = dict(error.trailing_metadata() or ())
    return reason_in(trailing.get(DETAILS))
