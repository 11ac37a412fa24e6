"""The server over two ranks: the same answers, and no process that outlives another."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from mora_serve import errors
from mora_serve.client import Client
from mora_serve.demo.bundle import bundle_path, read_examples
from mora_serve.demo.process import ServerProcess
from mora_serve.demo.scenes import ask_all
from mora_serve.server.ending import ENGINE_FAILED
from tests.server.conftest import OUTLASTING
from tests.server.conftest import running as served
from tests.server.process import server_process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
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


def test_the_bundled_models_answer_right_until_a_worker_is_killed() -> None:
    """Routed, hinted, mixed and abstained. Then streams are told, and the server ends as one whose
    engine has failed."""
    examples = [e for e in read_examples(bundle_path()) if e.kind != "late"]
    flags = {"base.dtype": "fp32", **TWO}
    with ServerProcess(flags) as server, Client(server.address) as client:
        server.wait_until_ready(client)
        rows = ask_all(client, examples)
        stream = iter(client.stream("hello", max_tokens=400, ignore_eos=True))
        next(stream)
        (worker,) = workers(server.pid)
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(errors.Unavailable) as caught:
            list(stream)
        assert server._process is not None
        assert server._process.wait(60) == ENGINE_FAILED
        log = server.whole_log
    assert [row.problem for row in rows if row.problem] == []
    assert caught.value.reason == "ENGINE_FAILED"
    assert "the process of rank 1 has ended with status -9" in log


def test_a_killed_server_leaves_no_worker(root) -> None:
    """In the middle of a step, as likely as not; nor a folder of theirs."""
    with server_process(root, **TWO) as (process, client):
        client.wait_until_ready(120)
        stream = iter(client.stream("hello", **OUTLASTING))
        next(stream)
        started = workers(process.pid)
        assert len(started) == 1
        process.kill()
        deadline = time.monotonic() + 30
        while any(map(running, started)):
            assert time.monotonic() < deadline, "a worker outlives its server"
            time.sleep(0.05)
        with pytest.raises(errors.Unavailable):
            list(stream)


def test_a_server_that_is_stopped_drains_and_ends_its_workers(configure) -> None:
    """A signal for the whole group of processes, as a terminal sends it, ends no worker early."""
    config = configure(engine={"tensor_parallel": 2, "threads": 1})
    with served(config) as serving, serving.client() as client:
        team = serving.server._assembly.engine.team
        (process,) = (w.process for w in team._workers)
        stream = iter(client.stream("hello", max_tokens=40, ignore_eos=True))
        next(stream)
        for number in (signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
        serving.end()
        assert len(list(stream)) > 0
        assert process.wait(60) == 0
    assert not serving.server.failed.is_set()
