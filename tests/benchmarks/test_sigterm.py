"""How a call's end is counted."""

from __future__ import annotations

import grpc
import pytest
from grpc import aio

from benchmarks.sigterm import Calls, CutShort


def error(code: grpc.StatusCode) -> aio.AioRpcError:
    return aio.AioRpcError(code, aio.Metadata(), aio.Metadata())


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
