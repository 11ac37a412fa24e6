"""Clients and adapters that misbehave, over gRPC: only their own requests end, and all is freed."""

from __future__ import annotations

import concurrent.futures
import json
import signal
import subprocess
import sys

import grpc
import numpy as np
import pytest

from mora_serve import errors
from mora_serve.client import connection
from mora_serve.engine import integrity
from mora_serve.engine.text import TextStream
from mora_serve.model.shape import shape_from_config
from mora_serve.model.tokenizer import Tokenizer
from tests.adapters import make
from tests.server.conftest import LONGEST, OUTLASTING, running, tensors, wait_for
from tests.server.test_drain import inside, narrow_channel, unread_stream

LONG = {"base": True, **OUTLASTING}
SHORT = {"base": True, "max_tokens": 30, "ignore_eos": True}

# A program that begins streams, says so, and reads no further.
CLIENT = f"""
import sys, time
from mora_serve.client import Client
client = Client(sys.argv[1], timeout=600)
streams = [client.stream("hello", base=True, max_tokens={LONGEST}, ignore_eos=True, logprobs=20)
           for _ in range(4)]
for stream in streams:
    next(iter(stream))
print("begun", flush=True)
time.sleep(600)
"""


def nothing_is_held(serving) -> bool:
    stats = serving.server._assembly.engine.stats()
    return (
        not (stats.running or stats.waiting or stats.kv_pages_used or stats.slots_used)
        and inside(serving) == 0
    )


def check_books(serving) -> None:
    engine = serving.server._assembly.engine
    integrity.check(engine._sequences.values(), engine.cache, engine.scheduler, engine.pool)


@pytest.fixture(scope="module")
def impatient(root):
    """A server that gives up on a stream after a second; its books are looked at in the end."""
    from tests.server.conftest import configuration

    with running(configuration(root, engine={"stall_seconds": 1.0})) as serving:
        yield serving
        wait_for(lambda: nothing_is_held(serving), 60)
        check_books(serving)


@pytest.fixture
def client(impatient):
    with impatient.client() as client:
        yield client


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_client_that_vanishes_or_freezes_holds_nothing(impatient, client, how):
    """Killed, or stopped with its connection open: a neighbour's answer is the same meanwhile."""
    want = client.generate("hello", **SHORT).tokens
    command = [sys.executable, "-c", CLIENT, impatient.server.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"begun\n"
            process.send_signal(how)
            assert client.generate("hello", **SHORT).tokens == want
            wait_for(lambda: nothing_is_held(impatient), 60)
        finally:
            process.kill()
    check_books(impatient)


def test_a_client_that_does_not_read_is_given_up(impatient, client):
    """When it reads again it learns why; a neighbour's stream is the same meanwhile."""
    want = client.generate("hello", **SHORT).tokens
    with narrow_channel(impatient) as channel:
        unread = unread_stream(channel)
        assert client.generate("hello", **SHORT).tokens == want
        wait_for(lambda: nothing_is_held(impatient), 60)
        with pytest.raises(grpc.RpcError) as caught:
            list(unread)
    error = connection.error_of(caught.value, "")
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "STREAM_STALLED")


def test_an_adapter_that_overflows_ends_its_own_requests(impatient, client, root):
    """Beside others in the same steps."""
    config = json.loads((root / "base" / "config.json").read_text())
    weights = tensors(shape_from_config(config), seed=5)
    huge = {name: (t * np.float32(1e20)) for name, t in weights.items()}
    make.directory(root / "adapters" / "overflow", make.config(4), huge)
    client.register_adapter("overflow", "overflow")
    client.register_adapter("good", "rev")
    options = {"adapters": {"good": 1.0}, "max_tokens": 30, "ignore_eos": True}
    want = client.generate("hello", **options).tokens
    with concurrent.futures.ThreadPoolExecutor() as threads:
        good = [threads.submit(client.generate, "hello", **options) for _ in range(4)]
        bad = [
            threads.submit(client.generate, "hello", adapters={"overflow": 1.0}) for _ in range(3)
        ]
        for call in bad:
            with pytest.raises(errors.FailedPrecondition) as caught:
                call.result(60)
            assert caught.value.reason == "NOT_FINITE"
        assert [call.result(60).tokens for call in good] == [want] * 4


def test_an_adapter_that_cannot_be_loaded_ends_its_own_requests(impatient, client, monkeypatch):
    """Its content breaks under the loading thread; others are answered, and so is a retry."""
    client.register_adapter("breaking", "plain")
    converter = impatient.server._assembly.engine.pool._host._converter
    monkeypatch.setattr(converter, "convert", lambda *args: 1 / 0)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        good = threads.submit(client.generate, "hello", **SHORT)
        with pytest.raises(errors.Internal) as caught:
            client.generate("hello", adapters={"breaking": 1.0})
        assert caught.value.reason == "LOAD_FAILED"
        assert "division" not in caught.value.message
        assert good.result(60).usage.completion_tokens == 30
    monkeypatch.undo()
    assert client.generate("hello", adapters={"breaking": 1.0}, max_tokens=1).tokens


def test_a_step_that_raises_ends_its_request(impatient, client, monkeypatch):
    """Its caller learns the request's id and nothing of the exception."""
    runner = impatient.server._assembly.engine.runner
    run = runner.run

    def faulty(batch):
        if any(c.sequence.request.id.startswith("culprit") for c in batch):
            raise RuntimeError("secret")
        return run(batch)

    want = client.generate("hello", **SHORT).tokens
    monkeypatch.setattr(runner, "run", faulty)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        good = [threads.submit(client.generate, "hello", **SHORT) for _ in range(4)]
        with pytest.raises(errors.Internal) as caught:
            client.generate("hello", request_id="culprit-7", **SHORT)
        assert [call.result(60).tokens for call in good] == [want] * 4
    assert caught.value.reason == "STEP_FAILED"
    assert "culprit-7" in caught.value.message
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("where", ["encode", "push"])
def test_what_a_tokenizer_raises_ends_its_request(impatient, client, monkeypatch, where):
    """Before the engine, or in the middle of an answer."""
    want = client.generate("hello", **SHORT).tokens
    if where == "encode":
        encode = Tokenizer.encode
        monkeypatch.setattr(
            Tokenizer, "encode", lambda self, text: 1 / 0 if "bad" in text else encode(self, text)
        )
    else:
        push = TextStream.push
        monkeypatch.setattr(
            TextStream,
            "push",
            lambda self, token: 1 / 0 if len(self._matchers) == 3 else push(self, token),
        )
    stop = ["§1", "§2", "§3"] if where == "push" else ["§"]
    with concurrent.futures.ThreadPoolExecutor() as threads:
        good = threads.submit(client.generate, "hello", **SHORT)
        with pytest.raises(errors.Internal) as caught:
            client.generate("bad", stop=stop, **SHORT)
        assert "division" not in caught.value.message
        assert good.result(60).tokens == want
