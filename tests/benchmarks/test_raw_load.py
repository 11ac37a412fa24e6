"""The cheap load generator and the watch, against a real server."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import raw_load
from benchmarks.keys import add_key
from benchmarks.raw_load import Answer, Flow, payload
from benchmarks.watch import Watch
from mora_serve.v1 import generation_pb2 as pb
from tests.server.conftest import Running, configuration, root, running

__all__ = ["root"]  # the fixture


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Running]:
    limits = {"max_batch": 1, "max_queue": 2, "tenant_queue": 1.0}
    with running(configuration(root, engine=limits)) as server:
        yield server


def request(tokens: int, text: str = "hello") -> str:
    return payload(
        pb.GenerateStreamRequest(
            prompt=pb.Prompt(text=text),
            selection=pb.Selection(base=pb.BaseOnly()),
            sampling=pb.SamplingParams(max_tokens=tokens, ignore_eos=True),
        )
    )


def test_answers_refusals_and_their_details_come_back(server: Running) -> None:
    """Of ten long answers at once some are refused, each with a reason and a pushback."""
    flows = [
        Flow("callers", (request(4),), raw_load.STREAM, callers=1, seconds=0.5),
        Flow("burst", (request(1000),), tenant="b", due=(1.0,) * 10),
        Flow("wrong", (request(4, ""),), due=(0.0,)),
    ]
    with Watch(os.getpid(), server.server.address) as watch:
        answers, cpu_seconds = raw_load.run(server.server.address, flows)
        time.sleep(1.2)  # a look at the process at least
    assert cpu_seconds > 0
    assert all(a.sent < a.first <= a.ended for a in answers["callers"] if a.code == "OK")
    assert len(answers["burst"]) == 10
    assert raw_load.counts(answers["burst"])["QUEUE_FULL"] >= 1
    assert not raw_load.untyped(answers["burst"])
    (wrong,) = answers["wrong"]
    assert (wrong.code, wrong.reason) == ("INVALID_ARGUMENT", "EMPTY_PROMPT")
    assert len(raw_load.untyped([wrong])) == 1
    assert watch.health_ms
    assert not watch.unhealthy
    assert watch.samples[-1].descriptors > 3
    assert watch.resident(0.0, -0.1) > 1e6
    assert watch.cpu_seconds > 0


def test_a_flow_has_its_key(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "access.toml"
    key = add_key(file, "one", "acme")
    with running(configuration(root, access={"file": str(file)})) as server:
        flows = [
            Flow("keyed", (request(4),), raw_load.STREAM, key=key, due=(0.0,)),
            Flow("bare", (request(4),), raw_load.STREAM, due=(0.0,)),
        ]
        answers, _ = raw_load.run(server.server.address, flows)
    assert answers["keyed"][0].code == "OK"
    assert (answers["bare"][0].code, answers["bare"][0].reason) == ("UNAUTHENTICATED", "NO_KEY")


def test_refusals_without_reason_or_pushback_are_told() -> None:
    good = Answer(0, 0, 0, 1, "RESOURCE_EXHAUSTED", "QUEUE_FULL", "100")
    bare = Answer(0, 0, 0, 1, "RESOURCE_EXHAUSTED")
    dumb = Answer(0, 0, 0, 1, "RESOURCE_EXHAUSTED", "QUEUE_FULL")
    other = Answer(0, 0, 0, 1, "UNAVAILABLE", "DRAINING", "100")
    done = Answer(0, 0, 0, 1, "OK")
    late = Answer(0, 0, 0, 1, "DEADLINE_EXCEEDED")
    assert len(raw_load.untyped([good, bare, dumb, other, done, late])) == 3


def test_only_whole_answers_in_time_count_as_goodput() -> None:
    answers = [
        Answer(0.0, 0.0, 0.0, 2.0, "OK"),
        Answer(1.0, 1.5, 0.0, 4.0, "OK"),  # three seconds from when it was due
        Answer(2.0, 2.0, 0.0, 3.0, "DEADLINE_EXCEEDED"),
        Answer(0.0, 0.0, 0.0, 0.5, "OK"),  # before the time that counts
    ]
    assert raw_load.steady(answers, 1.0, 5.0) == 0.5
    assert raw_load.steady(answers, 1.0, 5.0, deadline=2.5) == 0.25
