"""How a call's end is counted."""

from __future__ import annotations

import time

import grpc
import pytest
from grpc import aio

from benchmarks.rich_status import DETAILS
from benchmarks.sigterm import Calls, CutShort, judged
from mora_serve.errors import Unavailable
from mora_serve.server.status import status_of


def error(code: grpc.StatusCode) -> aio.AioRpcError:
    return aio.AioRpcError(code, aio.Metadata(), aio.Metadata())


def told(reason: str) -> aio.AioRpcError:
    details = status_of(Unavailable("server: it ends", reason=reason)).SerializeToString()
    return aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, aio.Metadata(), aio.Metadata((DETAILS, details))
    )


def across(raised: Exception | None, *, endless: bool = False, begun: bool = False) -> Calls:
    """Calls, one of which was under way at the signal and ended so."""
    calls = Calls()
    with calls.one("stream") as call:
        call.endless, call.begun = endless, begun
        calls.signalled = time.monotonic()
        if raised is not None:
            raise raised
    return calls


@pytest.mark.parametrize(
    ("raised", "endless", "begun", "figure"),
    [
        (None, False, True, "short_whole"),
        (error(grpc.StatusCode.UNAVAILABLE), False, True, "short_cut"),
        (error(grpc.StatusCode.UNAVAILABLE), False, False, "short_cut"),
        (CutShort(), False, True, "short_cut"),
        (told("DRAINING"), False, True, "short_cut"),
        (told("DRAINING"), False, False, "short_refused"),
        (told("DRAINING"), True, True, "endless_told"),
        (told("OTHER"), True, True, "endless_not_told"),
        (error(grpc.StatusCode.UNAVAILABLE), True, True, "endless_not_told"),
        (None, True, True, ""),
    ],
)
def test_a_server_that_ends_at_once_is_seen(
    raised: Exception | None, endless: bool, begun: bool, figure: str
) -> None:
    """What was under way at the signal is whole, or tells the server's reason: or it counts."""
    found = judged(across(raised, endless=endless, begun=begun).across)
    assert {name for name, count in found.items() if count} == ({figure} if figure else set())


def test_every_call_is_counted_by_how_it_ended() -> None:
    calls = Calls()
    for raised in (
        *(error(c) for c in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)),
        CutShort(),
        None,
    ):
        with calls.one("generate"):
            assert calls.open == 1
            if raised is not None:
                raise raised
    assert calls.ended == {"UNAVAILABLE": 1, "CANCELLED": 1, "cut short": 1, "whole": 1}
    assert calls.open == 0


def test_a_fault_of_the_measurement_is_not_counted() -> None:
    calls = Calls()
    with pytest.raises(ZeroDivisionError), calls.one("generate"):
        raise ZeroDivisionError
    assert not calls.ended
