"""What befell other servers over the wire, each as a test of this one.

The numbers are those under which the faults became known. Keys, and files of adapters, have
their own.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from benchmarks.bad_input_cases import LIMITS, MESSAGE_BYTES, failure, g, request_of, works
from benchmarks.leaks import leaks
from benchmarks.rpcs import METHODS
from mora_serve import errors
from mora_serve.client import Client
from mora_serve.demo.process import ServerProcess, free_port
from tests.server.conftest import Running, configuration, running_with

GENERATING = ("Generate", "GenerateStream")


@pytest.fixture(scope="module")
def small(root: Path) -> Iterator[Running]:
    """A server with rev and sum and the limits of the table of bad input."""
    with running_with(configuration(root, **LIMITS), "rev", "sum") as serving:
        yield serving


@pytest.fixture
def client(small: Running) -> Iterator[Client]:
    """A client; after each test the server still answers."""
    with small.client() as client:
        yield client
        assert works(client)


def refusal(client: Client, rpc: str, metadata: Any = None, **fields: Any) -> errors.MoraError:
    """How a call with these fields fails."""
    error = failure(client, METHODS[rpc], request_of(METHODS[rpc], fields), metadata=metadata)
    assert error is not None
    return error


@contextlib.contextmanager
def once(client: Client) -> Iterator[Any]:
    """A client of the same server that does not try again where grpc itself refuses."""
    with grpc.insecure_channel(client.address, (("grpc.enable_retries", 0),)) as channel:
        yield SimpleNamespace(channel=channel, address=client.address)


class TestNothingInternalIsTold:
    """Triton CVE-2025-23319 (a memory segment's name), vLLM CVE-2026-22778 (a heap address)."""

    @pytest.mark.parametrize("rpc", [*GENERATING, "Route"])
    def test_what_a_library_raises_stays_in_the_log(self, small, client, rpc, monkeypatch, caplog):
        told = '<_io.BytesIO object at 0x7f3a2c1b9d50> in /dev/shm/segment-1: File "x.py", line 3'

        def fail(*_: object) -> None:
            raise RuntimeError(told)

        tokenizer = type(small.server._assembly.base.tokenizer)
        with monkeypatch.context() as patch:
            for name in ("encode", "decode"):
                patch.setattr(tokenizer, name, fail)
            ids = g.Prompt(token_ids=g.TokenIds(ids=[1, 2]))
            prompt = ids if rpc == "Route" else g.Prompt(text="hello")
            metadata = [("mora-request-id", "find-me")]
            error = refusal(client, rpc, metadata, prompt=prompt)
        assert error.code == "INTERNAL"
        assert leaks(str(error)) == []
        assert "find-me" in str(error)
        assert "segment-1" in caplog.text

    @pytest.mark.parametrize("rpc", METHODS)
    def test_messages_that_do_not_parse(self, client, rpc):
        """The parser's own words, which name types and offsets, are not passed on."""
        error = failure(client, METHODS[rpc], b"\x0a\xff\xff\xff\xff\x0f")
        assert isinstance(error, errors.InvalidArgument)
        assert leaks(str(error)) == []

    def test_a_method_that_is_not_there(self, client):
        with pytest.raises(grpc.RpcError) as caught:
            client.channel.unary_unary("/mora_serve.v1.ServerService/Nothing")(b"", timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert leaks(caught.value.details()) == []


class TestEverythingLargeIsCapped:
    """vLLM CVE-2025-48956 (headers of any size), Triton CVE-2025-33201 (requests of any size)."""

    @pytest.mark.parametrize("rpc", METHODS)
    def test_metadata(self, client, rpc):
        """In one value or in many: refused before anything of ours sees it."""
        request = request_of(METHODS[rpc], {})
        with once(client) as impatient:
            for metadata in ([("x", "v" * 100_000)], [(f"x-{i}", "v" * 99) for i in range(1000)]):
                error = failure(impatient, METHODS[rpc], request, metadata=metadata)
                assert isinstance(error, errors.ResourceExhausted)

    def test_messages(self, client):
        with once(client) as impatient:
            for rpc in METHODS:
                error = failure(impatient, METHODS[rpc], b"x" * (MESSAGE_BYTES + 1))
                assert isinstance(error, errors.ResourceExhausted), rpc

    def test_a_message_that_is_small_until_it_is_unpacked(self, client):
        """The limit is one of what a message is, not of what it was compressed to."""
        call = client.channel.unary_unary("/mora_serve.v1.GenerationService/Generate")
        prompt = g.GenerateRequest(prompt=g.Prompt(text="x" * (4 * MESSAGE_BYTES)))
        with pytest.raises(grpc.RpcError) as caught:
            call(prompt.SerializeToString(), timeout=20, compression=grpc.Compression.Gzip)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    def test_a_message_that_is_nested_without_end(self, client):
        for rpc in METHODS:
            error = failure(client, METHODS[rpc], b"\x0b" * 100_000)
            assert isinstance(error, errors.InvalidArgument), rpc

    @pytest.mark.parametrize("rpc", [*GENERATING, "Route"])
    @pytest.mark.parametrize(
        ("field", "fields"),
        [
            ("prompt.text", {"prompt": g.Prompt(text="x" * 900_000)}),
            ("prompt.token_ids", {"prompt": g.Prompt(token_ids=g.TokenIds(ids=[1] * 100_000))}),
            (
                "prompt.chat.messages",
                {"prompt": g.Prompt(chat=g.Chat(messages=[g.ChatMessage()] * 100_000))},
            ),
            (
                "selection.mixture.adapters",
                {
                    "selection": g.Selection(
                        mixture=g.Mixture(adapters=[g.AdapterWeight(adapter="rev")] * 50_000)
                    )
                },
            ),
            (
                "selection.task.tasks",
                {"selection": g.Selection(task=g.TaskHint(tasks=["do-rev"] * 50_000))},
            ),
            (
                "selection.auto.candidates",
                {"selection": g.Selection(auto=g.AutoRoute(candidates=["rev"] * 50_000))},
            ),
            (
                "selection.auto.max_adapters",
                {"selection": g.Selection(auto=g.AutoRoute(max_adapters=4_000_000_000))},
            ),
        ],
    )
    def test_prompts_and_selections(self, client, rpc, field, fields):
        error = refusal(client, rpc, **fields)
        assert isinstance(error, errors.InvalidArgument)
        assert error.field == field
        assert len(str(error)) < 500

    @pytest.mark.parametrize("rpc", GENERATING)
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("max_tokens", 4_000_000_000),
            ("stop", ["x"] * 50_000),
            ("stop", ["x" * 900_000]),
            ("stop_token_ids", [1] * 100_000),
            ("logprobs", 4_000_000_000),
        ],
    )
    def test_sampling(self, client, rpc, name, value):
        error = refusal(client, rpc, sampling=g.SamplingParams(**{name: value}))
        assert isinstance(error, errors.InvalidArgument)
        assert error.field.startswith(f"sampling.{name}")
        assert len(str(error)) < 500

    @pytest.mark.parametrize(
        ("name", "value"), [("mora-tenant", "t" * 7000), ("mora-request-id", "r" * 7000)]
    )
    def test_what_identifies_a_call(self, client, name, value):
        """It would be kept in keys and written to logs."""
        error = refusal(client, "GetServerInfo", [(name, value)])
        assert isinstance(error, errors.InvalidArgument)
        assert error.field == name
        assert len(str(error)) < 500


def test_vllm_cve_2025_25183_equal_prompts_of_two_tenants_share_no_prefix(small):
    """There, a prefix could be met by a collision of hashes; here, not even by the same prompt."""
    prompt, options = "a prompt of some length " * 4, {"base": True, "max_tokens": 1}
    with small.client("one") as one, small.client("two") as two:
        assert one.generate(prompt, **options).usage.cached_tokens == 0
        assert one.generate(prompt, **options).usage.cached_tokens > 0
        assert two.generate(prompt, **options).usage.cached_tokens == 0


def test_ray_cve_2023_48022_no_port_is_open_that_was_not_asked_for(root):
    """There, a port for jobs listened to everyone. Here: two ports, on loopback."""
    metrics = free_port()
    flags = {
        "base.model": root / "base",
        "base.quantization": "none",
        "server.metrics_port": metrics,
    }
    with ServerProcess(flags) as server, Client(server.address) as client:
        server.wait_until_ready(client)
        client.generate("hello", base=True, max_tokens=1)
        grpc_port = int(server.address.rpartition(":")[2])
        found = {(host.removeprefix("::ffff:"), port) for host, port in listening(server.pid)}
        assert found == {("127.0.0.1", grpc_port), ("127.0.0.1", metrics)}


def listening(pid: int) -> set[tuple[str, int]]:
    """Where a process listens, as Linux tells it."""
    links = [Path(f"/proc/{pid}/fd/{fd.name}") for fd in Path(f"/proc/{pid}/fd").iterdir()]
    inodes = set()
    for link in links:
        if match := re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink())):
            inodes.add(match[1])
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                host, port = fields[1].split(":")
                words = [int(host[i : i + 8], 16) for i in range(0, len(host), 8)]
                packed = struct.pack(f"={len(words)}I", *words)
                address = socket.inet_ntop(family, packed).removeprefix("::ffff:")
                found.add((address, int(port, 16)))
    return found
