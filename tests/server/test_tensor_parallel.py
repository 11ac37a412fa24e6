"""The server over two ranks: the same answers, and no process that outlives another."""

from __future__ import annotations

import os
import signal
import time

import pytest

from mora_serve import errors
from mora_serve.client import Client
from mora_serve.demo.bundle import bundle_path, read_examples
from mora_serve.demo.process import ServerProcess
from mora_serve.demo.scenes import ask_all
from mora_serve.server.ending import ENGINE_FAILED
from tests.server.conftest import OUTLASTING
from tests.server.process import server_process

TWO = {"engine.tensor_parallel": 2, "engine.threads": 1}


def workers(pid: int) -> list[int]:
    """The processes that a process has started and that are there still."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        found = [int(child) for child in file.read().split()]
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/children") as file:
            found += [int(child) for child in file.read().split()]
    return sorted(set(found))


def running(pid: int) -> bool:
    """Whether a process is there, and more than an entry in the table."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(map(running, pids)):
        assert time.monotonic() < deadline, "a worker outlives its server"
        time.sleep(0.05)


def test_the_bundled_models_answer_right_and_a_killed_server_leaves_no_worker() -> None:
    """Routed, hinted, mixed and abstained; then rank 0 ends by SIGKILL, and they with it."""
    examples = [e for e in read_examples(bundle_path()) if e.kind != "late"]
    flags = {"base.dtype": "fp32", **TWO}
    with ServerProcess(flags) as server, Client(server.address) as client:
        server.wait_until_ready(client)
        rows = ask_all(client, examples)
        started = workers(server.pid)
        assert len(started) == 1
        os.kill(server.pid, signal.SIGKILL)
        wait_for_end(started)
    assert [row.problem for row in rows if row.problem] == []


def test_a_killed_worker_ends_the_server_as_a_failed_engine_does(root) -> None:
    """Streams under way are told; the process ends with the engine's status."""
    with server_process(root, **TWO) as (process, client):
        client.wait_until_ready(120)
        stream = iter(client.stream("hello", **OUTLASTING))
        next(stream)
        (worker,) = workers(process.pid)
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(errors.Unavailable) as caught:
            list(stream)
        assert caught.value.reason == "ENGINE_FAILED"
        assert process.wait(60) == ENGINE_FAILED
    log = process.stderr.read().decode()
    assert "the process of rank 1 has ended with status -9" in log


def test_a_server_that_is_stopped_drains_and_ends_its_workers(root) -> None:
    """Ctrl-C at a terminal reaches every process of its group; so may SIGTERM."""
    with server_process(root, **TWO, **{"server.drain_seconds": 20}) as (process, client):
        client.wait_until_ready(120)
        stream = iter(client.stream("hello", max_tokens=40, ignore_eos=True))
        next(stream)
        started = workers(process.pid)
        for worker in started:
            os.kill(worker, signal.SIGTERM)
        process.terminate()
        assert len(list(stream)) > 0
        assert process.wait(30) == 0
        wait_for_end(started)
    log = process.stderr.read().decode()
    assert "Traceback" not in log
    assert "has ended" not in log
