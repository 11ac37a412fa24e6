"""The fuzzer of the wire: it can be repeated, leaves no RPC out, and sees what is wrong."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from pathlib import Path

import pytest

from benchmarks import wire_keys, written
from benchmarks.fuzz_wire import fuzz
from benchmarks.leaks import leaks
from benchmarks.rpcs import METHODS, path_of
from benchmarks.wire_cases import Cases, WireCase
from benchmarks.wire_verdict import Outcome, wrong
from mora_serve import errors
from mora_serve.demo.bundle import bundle_path
from mora_serve.server.status import status_of


@pytest.fixture(scope="module")
def cases() -> Cases:
    return Cases(bundle_path(), seed=3, patience=60.0)


@pytest.fixture(scope="module")
def plain(cases: Cases) -> WireCase:
    """A case as its method is declared, with an ordinary deadline, to its end."""
    numbers = (cases.case(n) for n in itertools.count())
    return next(c for c in numbers if c.as_declared and not c.hurried and c.reads is None)


def test_a_number_is_always_the_same_case(cases: Cases) -> None:
    again = Cases(bundle_path(), seed=3, patience=60.0)
    other = Cases(bundle_path(), seed=4, patience=60.0)
    assert [cases.case(n) for n in range(50)] == [again.case(n) for n in range(50)]
    assert [cases.case(n) for n in range(50)] != [other.case(n) for n in range(50)]


def test_every_rpc_has_its_cases_most_of_them_as_declared(cases: Cases) -> None:
    made = [cases.case(n) for n in range(100 * len(METHODS))]
    for name, method in METHODS.items():
        own = [c for c in made if c.method is method]
        assert len(own) > 80, name
        assert sum(c.as_declared for c in own) > 60, name
        assert len({c.messages for c in own}) > 20 or not method.input_type.fields, name


def typed(error: errors.MoraError, **changes: object) -> Outcome:
    status = status_of(error)
    outcome = Outcome(error.code, status.message, status.SerializeToString())
    return dataclasses.replace(outcome, **changes)  # type: ignore[arg-type]


NOT_FOUND = errors.NotFound("name: 'x' is not registered; list the adapters", field="name")


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome("OK"),
        typed(NOT_FOUND),
        typed(errors.ResourceExhausted("queue: it is full; try again", retry_after=1.0)),
        Outcome("RESOURCE_EXHAUSTED", "SERVER: Received message larger than max (9 vs. 4)"),
    ],
)
def test_answers_and_typed_statuses_are_right(plain: WireCase, outcome: Outcome) -> None:
    assert wrong(plain, outcome) == []


@pytest.mark.parametrize(
    ("outcome", "what"),
    [
        (Outcome("UNKNOWN", "Unexpected <class 'KeyError'>"), "untyped UNKNOWN"),
        (Outcome("INTERNAL", "x"), "untyped INTERNAL"),
        (typed(errors.Internal("internal error; request 7")), "undocumented INTERNAL"),
        (Outcome("NOT_FOUND", "no such name"), "untyped NOT_FOUND"),
        (Outcome("UNAVAILABLE", "Socket closed"), "untyped UNAVAILABLE"),
        (Outcome("UNIMPLEMENTED", "whatever"), "untyped UNIMPLEMENTED"),
        (Outcome("DEADLINE_EXCEEDED", "Deadline Exceeded"), "took too long"),
        (Outcome("HANGS"), "untyped HANGS"),
        (Outcome("CANCELLED"), "was cancelled"),
        (typed(NOT_FOUND, message="another"), "messages differ"),
        (typed(NOT_FOUND, rich=b"\xff"), "without a reason"),
        (typed(errors.NotFound("name: x", reason="no reason")), "without a reason"),
        (typed(errors.NotFound("path: /srv/adapters/x is not there")), "/srv/adapters/x"),
        (Outcome("OK", trailing=(("x", "0x7f3a2c1b9d50"),)), "0x7f3a2c1b9d50"),
        (Outcome("OK", answers=(b"\xff\xff",)), "no message of its type"),
    ],
)
def test_what_is_wrong_is_seen(plain: WireCase, outcome: Outcome, what: str) -> None:
    assert what in "; ".join(wrong(plain, outcome))


@pytest.mark.parametrize(
    "text",
    [
        *("cannot open /srv/adapters/x", "in ~/state", "see '/tmp/a'", "at 0x7ffd1234", "x.py"),
        *('File "a", line 3, in f', "Traceback (most recent call last)", "KeyError: 'a'"),
        *("connect to 10.0.0.1:50051", "ipv4:127.0.0.1:1", "<_io.BytesIO object at 1>"),
        *("grpc/server.pyx.pxi", "<function f at 1>", "OSError"),
    ],
)
def test_insides_are_recognised_unless_the_caller_said_them(text: str) -> None:
    assert leaks(text)
    assert not leaks(text, sent=b"what " + text.encode() + b" was asked for")
    assert leaks("some secret here", b"secret", ["secret"])


@pytest.mark.parametrize(
    "text",
    [
        "name: 'A/B' is not a valid name; use '.', '_' or '-', '/'",
        "path: give one relative to adapters.root, and/or raise adapters.max_bytes",
        "adapter_model.safetensors: 3 bytes are more than the 2 that are accepted",
    ],
)
def test_plain_messages_give_nothing_away(text: str) -> None:
    assert leaks(text) == []


def keyed(case: WireCase, kind: str, **changes: object) -> WireCase:
    return dataclasses.replace(case, key=kind, metadata=(), **changes)  # type: ignore[arg-type]


NO_KEY = errors.Unauthenticated("authorization: the call has no key", reason="NO_KEY")
WRONG_ROLE = errors.PermissionDenied("method: key 'a' may not call it", reason="WRONG_ROLE")
PIN = path_of(METHODS["PinAdapter"])


@pytest.mark.parametrize("kind", sorted(wire_keys.OFTEN.keys() - {"whole", "generate"}))
def test_a_call_whose_key_is_no_better_has_to_be_refused(plain: WireCase, kind: str) -> None:
    assert wrong(keyed(plain, kind), typed(NO_KEY)) == []
    for outcome in (Outcome("OK"), typed(NOT_FOUND), typed(WRONG_ROLE)):
        assert wrong(keyed(plain, kind), outcome)


def test_a_key_is_for_its_roles_and_tenant_alone(plain: WireCase) -> None:
    """And one that is whole is not refused."""
    assert wrong(keyed(plain, "generate", path=PIN), typed(WRONG_ROLE)) == []
    assert wrong(keyed(plain, "generate", path=PIN), Outcome("OK"))
    assert wrong(keyed(plain, "whole", path=PIN), Outcome("OK")) == []
    assert wrong(keyed(plain, "whole", path=PIN), typed(NO_KEY))
    other = dataclasses.replace(keyed(plain, "whole"), metadata=(("mora-tenant", "default"),))
    assert wrong(other, typed(WRONG_ROLE)) == []
    assert wrong(other, typed(NOT_FOUND))


def test_most_cases_have_a_whole_key_and_every_kind_is_there(cases: Cases) -> None:
    kinds = collections.Counter(cases.case(n).key for n in range(1500))
    assert kinds.keys() == wire_keys.OFTEN.keys()
    assert kinds["whole"] > 1200


def test_lines_that_are_none_tell_a_key_or_a_fault_are_seen() -> None:
    good = '{"time": "1", "message": "x"}'
    library = "E1129 12:00:00.1 7 chttp2_transport.cc:1] x"
    read = written.read(f"{good}\n{library}\n", ("time",), ["mora_x"])
    assert (len(read.lines), read.library, read.wrong) == (1, 1, [])
    for bad in (
        *("Traceback (most recent call last):", "[1]", '{"message": "x"}', good[:-1]),
        *('{"time": "1", "message": "mora_x"}', '{"time": "1", "exception": "KeyError"}'),
    ):
        assert len(written.read(f"{good}\n{bad}\n{good}", ("time",), ["mora_x"]).wrong) == 1, bad


def test_a_short_run_against_a_server_of_its_own(tmp_path: Path) -> None:
    result = fuzz(tmp_path, range(20 * len(METHODS)), seed=11, seconds=200, tell=False)
    assert result["what"] == {}
    assert result["wrong"] == 0
    assert result["same_answers"] == 1
    assert result["requests"] == 20 * len(METHODS)
    assert {"OK", "INVALID_ARGUMENT", "UNAUTHENTICATED"} <= result["codes"].keys()
    assert result["log_lines_of_calls"] > result["requests"] / 2
    assert result["audit_events"]["denied"]
