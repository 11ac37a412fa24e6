"""How a call of ``fuzz_wire`` ended, and what is not as it should be about that."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2  # type: ignore[import-untyped]

from benchmarks import wire_keys
from benchmarks.leaks import leaks
from benchmarks.rich_status import DETAILS, info_in, status_in
from benchmarks.rpcs import raw
from benchmarks.wire_cases import WireCase
from mora_serve import errors

# What every one of these says has been written by hand; UNKNOWN and INTERNAL are nobody's.
DOCUMENTED = {e.code for e in errors.MoraError.__subclasses__()} - {"UNKNOWN", "INTERNAL"}
# grpc's own answers to what it does not let through.
_OWN = {
    "RESOURCE_EXHAUSTED": r".*[Mm]essage larger than max|received .*metadata size exceeds",
    "UNIMPLEMENTED": r"Method not found!$",
}


@dataclass(frozen=True)
class Outcome:
    """How a call ended: a status, and the messages that came before it."""

    code: str
    message: str = ""
    rich: bytes | None = None
    trailing: tuple[tuple[str, str | bytes], ...] = ()
    answers: tuple[bytes, ...] = ()


def make(channel: grpc.Channel, case: WireCase) -> Outcome:
    """Make a call; how it ends."""
    method = raw(channel, case.path, case.streams)
    sent: Any = iter(case.messages) if case.streams[0] else case.messages[0]
    options: dict[str, Any] = {
        "timeout": case.timeout,
        "metadata": case.metadata,
        "compression": grpc.Compression.Gzip if case.compressed else None,
    }
    received: list[bytes] = []
    try:
        if case.streams[1]:
            call = method(sent, **options)
            if case.reads == 0:
                call.cancel()
            for message in call:
                received.append(message)
                if len(received) == case.reads:
                    call.cancel()
        else:
            answer, call = method.with_call(sent, **options)
            received.append(answer)
    except grpc.RpcError as e:
        call = e
    pairs = tuple((m.key, m.value) for m in call.trailing_metadata() or ())
    rich = dict(pairs).get(DETAILS)
    return Outcome(call.code().name, call.details() or "", rich, pairs, tuple(received))


def wrong(case: WireCase, outcome: Outcome, secrets: Sequence[str] = ()) -> list[str]:
    """What is not as it should be about how a call ended."""
    found = [f"gives away {leak}" for leak in leaks(_told(outcome), case.sent, secrets)]
    if case.method is not None and case.as_declared:
        kind = message_factory.GetMessageClass(case.method.output_type)
        for answer in outcome.answers:
            try:
                kind.FromString(answer)
            except DecodeError:
                found.append("an answer is no message of its type")
    due = wire_keys.refusal(case.key, case.path, case.metadata)
    if due and (outcome.code == "OK" or outcome.answers):
        found.append(f"was let in with a key of the kind {case.key}, not refused as {due}")
    if outcome.code == "OK":
        return found
    if outcome.code == "CANCELLED":
        return found if case.reads is not None else [*found, f"was cancelled: {outcome.message}"]
    if outcome.code == "DEADLINE_EXCEEDED":
        return found if case.hurried else [*found, "took too long"]
    if outcome.rich is None:
        own = re.compile(_OWN.get(outcome.code, "(?!)"))
        health = case.path.startswith("/grpc.health") and outcome.code == "NOT_FOUND"
        if not health and not own.match(outcome.message):
            found.append(f"untyped {outcome.code}: {outcome.message}")
        return found
    if due and outcome.code not in (due, "INVALID_ARGUMENT"):  # a request id is looked at before
        found.append(f"{outcome.code} with a key of the kind {case.key}, not {due}")
    if not due and case.key and outcome.code == "UNAUTHENTICATED":
        found.append(f"a key of the kind {case.key} was refused")
    if outcome.code not in DOCUMENTED:
        found.append(f"undocumented {outcome.code}: {outcome.message}")
    status = status_in(outcome.rich)
    info = info_in(status)
    reason = "" if info is None or info.domain != "mora-serve" else info.reason
    if not re.fullmatch("[A-Z][A-Z0-9_]*", reason):
        found.append(f"{outcome.code} without a reason: {outcome.message}")
    if status is not None and status.message != outcome.message:
        found.append("its two messages differ")
    return found


def _told(outcome: Outcome) -> str:
    """All text that the status carries."""
    texts = [outcome.message]
    violation, status = error_details_pb2.BadRequest(), status_in(outcome.rich)
    for detail in status.details if status else ():
        if detail.Unpack(violation):
            texts += [v.description for v in violation.field_violations]
    texts += [f"{k}={v}" for k, v in outcome.trailing if isinstance(v, str)]
    return "\n".join(texts)


def spoken(heard: str, secrets: Sequence[str]) -> list[str]:
    """What a connection gave away; in bytes that are no text, all may look like a path."""
    told = leaks(heard, b"", secrets)
    return [t for t in told if t.startswith(("traceback", "source", "exception", "secret"))]
