"""Any message, any bytes and any metadata get an answer or a documented status; life goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.bad_input_cases import works
from benchmarks.rpcs import METHODS
from benchmarks.wire_cases import WireCase
from benchmarks.wire_verdict import make, wrong
from tests.server.conftest import Running, configuration, running_with

FEW = settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NAMES = st.sampled_from(["rev", "sum", "do-rev", "nothing", ""]) | st.text(max_size=70)
VALUES: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_INT32: st.integers(-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: st.integers(-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT32: st.integers(0, 40) | st.integers(0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: st.integers(0, (1 << 64) - 1),
    FieldDescriptor.CPPTYPE_FLOAT: st.sampled_from([0.0, 0.5, 1.0]) | st.floats(width=32),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats(),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
}
# Header names may not begin with "grpc-": these are grpc's own.
KEYS = st.from_regex(
    r"(mora-tenant|mora-request-id|authorization|x-[a-z0-9._-]{1,20})", fullmatch=True
)
TEXTS = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=200)


def value(f: FieldDescriptor) -> st.SearchStrategy[Any]:
    """What a field can be set to."""
    if f.message_type is not None:
        one: st.SearchStrategy[Any] = messages(f.message_type)
    elif f.type == FieldDescriptor.TYPE_BYTES:
        one = st.binary(max_size=100)
    elif f.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        one = NAMES
    else:
        one = VALUES[f.cpp_type]
    return st.lists(one, max_size=6) if f.is_repeated else one


def messages(descriptor: Descriptor) -> st.SearchStrategy[Message]:
    """Messages of a type, any of their fields set."""
    kind = message_factory.GetMessageClass(descriptor)
    fields = st.fixed_dictionaries({}, optional={f.name: value(f) for f in descriptor.fields})
    return fields.map(lambda given: kind(**given))


@pytest.fixture(scope="module")
def fuzzed(root: Any) -> Iterator[Running]:
    """A server with rev and sum, whose answers are short."""
    config = configuration(root, engine={"max_tokens": 4}, router={"feedback": True})
    with running_with(config, "rev", "sum") as serving:
        yield serving


@pytest.fixture
def check(fuzzed: Running) -> Iterator[Any]:
    """Makes a call of a method; nothing may be wrong with its end. At last a good one is served."""

    def check(rpc: str, *sent: bytes, metadata: tuple[Any, ...] = ()) -> None:
        method = METHODS[rpc]
        case = WireCase(
            path=f"/{method.containing_service.full_name}/{rpc}",
            method=method,
            streams=(method.client_streaming, method.server_streaming),
            messages=sent,
            metadata=metadata or (("mora-tenant", "fuzz"),),
            timeout=60.0,
            reads=None,
            compressed=False,
        )
        assert wrong(case, make(client.channel, case)) == []

    with fuzzed.client() as client:
        yield check
        assert works(client)


@pytest.mark.parametrize("rpc", METHODS)
class TestEveryRpc:
    def test_any_message(self, rpc, check):
        @FEW
        @given(messages(METHODS[rpc].input_type))
        def ask(message: Message) -> None:
            check(rpc, message.SerializeToString())

        ask()

    def test_any_bytes(self, rpc, check):
        @FEW
        @given(st.binary(max_size=200))
        def ask(data: bytes) -> None:
            check(rpc, data)

        ask()


class TestAnyRpc:
    @FEW
    @given(messages=st.lists(messages(METHODS["UploadAdapter"].input_type), max_size=5))
    def test_any_upload(self, check, messages):
        check("UploadAdapter", *(m.SerializeToString() for m in messages))

    @FEW
    @given(rpc=st.sampled_from(sorted(METHODS)), pairs=st.lists(st.tuples(KEYS, TEXTS), max_size=8))
    def test_any_metadata(self, check, rpc, pairs):
        check(rpc, b"", metadata=tuple(pairs))
