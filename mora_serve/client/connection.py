"""What both clients share: the channel's options, what a call carries, how answers are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mora_serve import errors, messages
from mora_serve.adapters.untrusted import check_name
from mora_serve.client.arguments import invalid
from mora_serve.client.requests import CallOptions
from mora_serve.client.security import ApiKey, Tls, authorization
from mora_serve.config import ServerConfig
from mora_serve.core import Decision, Finish, TokenOut, Usage
from mora_serve.loopback import leads_to_loopback
from mora_serve.v1 import (
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    router_pb2_grpc,
    server_pb2_grpc,
)

DEFAULT_ADDRESS = f"{ServerConfig.host}:{ServerConfig.port}"

# Not repeated: an upload, and a removal (which the repetition would report as not found).
_REPEATABLE = {
    "GenerationService": ("Generate", "GenerateStream"),
    "AdapterService": (
        *("RegisterAdapter", "UpdateAdapter", "ListAdapters", "GetAdapter", "PinAdapter"),
    ),
    "RouterService": ("Route", "LoadRouter", "GetRouter", "ExportFeedback"),
    "ServerService": ("GetServerInfo",),
}
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": f"mora_serve.v1.{service}", "method": method}
                for service, methods in _REPEATABLE.items()
                for method in methods
            ],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ]
}
OPTIONS = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.max_receive_message_length", -1),  # the server states its limits
    ("grpc.max_send_message_length", -1),
)


def options(address: str, tls: Tls | bool = False) -> tuple[tuple[str, Any], ...]:
    """The options of a channel to ``address``."""
    found: tuple[tuple[str, Any], ...] = OPTIONS
    if leads_to_loopback(address):
        # What stays on this machine does not take the way of the surroundings' proxy.
        found += (("grpc.enable_http_proxy", 0),)
    if isinstance(tls, Tls) and tls.name:
        found += (("grpc.ssl_target_name_override", tls.name),)
    return found


# What grpc's asyncio client says where a message met a call that the server had just ended.
_LOST = "Internal error from Core"


@dataclass(frozen=True, slots=True)
class Result:
    """One whole answer; ``seed`` gives it again."""

    text: str
    tokens: tuple[TokenOut, ...]
    decision: Decision
    usage: Usage
    finish: Finish
    request_id: str
    seed: int


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of a streamed answer."""

    text: str
    tokens: tuple[TokenOut, ...]


class Streamed:
    """What a stream has told so far; ``finish`` and ``usage`` are None until it has ended."""

    def __init__(
        self, stubs: Stubs, call: Any, received: Any, first: generation_pb2.GenerateStreamResponse
    ) -> None:
        self._stubs, self._call, self._received = stubs, call, received
        self.request_id = first.started.request_id
        self.decision = messages.decision_of(first.started.decision)
        self.prompt_tokens = first.started.prompt_tokens
        self.seed = first.started.seed
        self.finish: Finish | None = None
        self.usage: Usage | None = None

    def cancel(self) -> None:
        """End the generation on the server, if it has not ended."""
        self._call.cancel()

    def take(self, message: generation_pb2.GenerateStreamResponse) -> Delta | None:
        """The piece that a message carries, or None for the last message."""
        if message.WhichOneof("event") == "delta":
            tokens = tuple(messages.token_of(t) for t in message.delta.tokens)
            return Delta(message.delta.text, tokens)
        self.finish = messages.finish_of(message.finished.finish_reason)
        self.usage = messages.usage_of(message.finished.usage, message.finished.timings)
        return None


class Stubs:
    """The services behind one channel, and what every call carries.

    Raises InvalidArgument for a tenant that cannot be one.
    """

    def __init__(
        self,
        channel: Any,
        address: str,
        tenant: str,
        timeout: float | None,
        api_key: ApiKey | None = None,
    ) -> None:
        if tenant:
            check_name(tenant, "tenant")
        self.channel, self.address = channel, address
        self._tenant, self._timeout, self._api_key = tenant, timeout, api_key
        self.generation: Any = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        self.adapters: Any = adapters_pb2_grpc.AdapterServiceStub(channel)  # type: ignore[no-untyped-call]
        self.router: Any = router_pb2_grpc.RouterServiceStub(channel)  # type: ignore[no-untyped-call]
        self.server: Any = server_pb2_grpc.ServerServiceStub(channel)  # type: ignore[no-untyped-call]
        self.health: Any = health_pb2_grpc.HealthStub(channel)

    def carry(self, options: CallOptions) -> dict[str, Any]:
        """Timeout and metadata of a call, as grpc's keyword arguments.

        Raises InvalidArgument for a request id or a key that is no plain text.
        """
        metadata = []
        if self._api_key is not None:
            metadata.append(authorization(self._api_key))
        if self._tenant:
            metadata.append(("mora-tenant", self._tenant))
        if request_id := options.get("request_id"):
            if not (request_id.isascii() and request_id.isprintable()):
                raise invalid("request_id", request_id, "ASCII letters and digits")
            metadata.append(("mora-request-id", request_id))
        return {"timeout": options.get("timeout", self._timeout), "metadata": metadata}


def read_result(answer: generation_pb2.GenerateResponse) -> Result:
    """The answer of Generate."""
    return Result(
        answer.text,
        tuple(messages.token_of(t) for t in answer.tokens),
        messages.decision_of(answer.decision),
        messages.usage_of(answer.usage, answer.timings),
        messages.finish_of(answer.finish_reason),
        answer.request_id,
        answer.seed,
    )


HEALTH = health_pb2.HealthCheckRequest()
HEALTH_SECONDS = 0.1  # between two questions


def is_ready(answer: health_pb2.HealthCheckResponse) -> bool:
    """Whether the server said that it serves."""
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def not_ready(address: str, timeout: float) -> errors.Unavailable:
    """The server did not become ready in time."""
    return errors.Unavailable(
        f"server {address}: not ready after {timeout:g} seconds; look at its log, or wait longer",
        reason="NOT_READY",
    )


def error_of(error: Any, address: str) -> errors.MoraError:
    """The failure of a call: a ``grpc.RpcError`` -> the class of its code, details decoded."""
    code, message = error.code().name, error.details() or ""
    details = _details(error)
    if details is None:  # the status is grpc's own
        if code == "UNAVAILABLE" and "handshake" in message.lower():
            message = (
                f"server {address}: no secure connection; does it speak TLS, is its certificate of "
                f"the CA that tls names and for this address, does it want a client's? ({message})"
            )
        elif code == "UNAVAILABLE":
            message = f"server {address}: not reachable; is it running? ({message})"
        elif code == "DEADLINE_EXCEEDED":
            message = "the timeout passed before the answer was complete; give the call longer"
        elif code == "INTERNAL" and message == _LOST:
            return errors.Unavailable(
                f"server {address}: it ended the call while the request was still being sent, and "
                "grpc lost the reason; send it again, or with the blocking client",
                reason="ENDED_EARLY",
            )
        details = {}
    cls = errors.class_of(code)
    if cls is not errors.MoraError:
        return cls(message, **details)
    failure = cls(message, **{"reason": code} | details)
    failure.code = code
    return failure


def _details(error: Any) -> dict[str, Any] | None:
    """Reason, field and retry_after of a rich status; None when there is none."""
    packed = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    if packed is None:
        return None
    try:
        status = status_pb2.Status.FromString(packed)
    except DecodeError:
        return None
    found: dict[str, Any] = {}
    info, request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for detail in status.details:
        if detail.Unpack(info):
            found["reason"] = info.reason
        elif detail.Unpack(request) and request.field_violations:
            found["field"] = request.field_violations[0].field
        elif detail.Unpack(retry):
            found["retry_after"] = retry.retry_delay.ToMilliseconds() / 1000
    return found
