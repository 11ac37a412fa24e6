"""Two gateways and two replicas on Ray Serve, asked through the client of a single server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.local_cluster import LocalCluster
from mora_serve.client import AsyncClient, Client
from mora_serve.client.connection import HEALTH, is_ready
from mora_serve.config import Config, ServerConfig
from mora_serve.demo.bundle import bundle_path, read_examples
from mora_serve.errors import (
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from mora_serve.server.app import MoraServer

pytest.importorskip("ray.serve", reason="Ray is not installed: pip install 'mora-serve[ray]'")
pytestmark = pytest.mark.timeout(600)

MANY, LONG = 32, 400  # requests at once, and their tokens: seconds of work
SECONDS = 60.0  # that a condition may take on a busy machine


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    folder = tmp_path_factory.mktemp("cluster")
    flags = {
        "server.store": f"file://{folder}/store",
        "server.state": str(folder / "state"),
        "adapters.root": str(bundle_path() / "adapters"),
        "cluster.replicas": 2,
        "cluster.gateways": 2,
    }
    with LocalCluster(flags) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster.address, timeout=120) as client:
        yield client


def becomes(holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if holds():
            return True
        time.sleep(0.1)
    return False


async def test_answers_are_those_of_a_single_server(cluster: LocalCluster):
    single = Config(server=ServerConfig(port=0, metrics_port=-1))
    prompts = [e.prompt for e in read_examples(bundle_path())][:8]
    async with (
        MoraServer(single) as server,
        AsyncClient(server.address) as alone,
        AsyncClient(cluster.address) as many,
    ):
        for prompt in prompts:
            for options in ({}, {"temperature": 0.8, "seed": 7, "logprobs": 2}):
                expected = await alone.generate(prompt, max_tokens=24, **options)
                answer = await many.generate(prompt, max_tokens=24, **options)
                assert answer.text == expected.text
                assert answer.tokens == expected.tokens
                assert answer.decision == expected.decision
                assert answer.finish == expected.finish


def test_streams_come_piece_by_piece(client: Client):
    with client.stream("say the word", max_tokens=64, ignore_eos=True) as stream:
        pieces = list(stream)
        assert len(pieces) > 2
        assert sum(len(p.tokens) for p in pieces) == 64
        assert stream.usage.completion_tokens == 64


def test_health_and_what_the_server_says_of_itself(client: Client):
    client.wait_until_ready(timeout=SECONDS)
    assert client.server_info().base.name == "demo"


def test_errors_are_typed_and_say_nothing_of_the_inside(client: Client):
    with pytest.raises(NotFound) as e:
        client.generate("x", adapters={"revers": 1.0})
    assert "reverse" in e.value.message
    with pytest.raises(InvalidArgument) as e:
        client.generate(token_ids=[1] * 4000, max_tokens=4000)  # the engine says so
    assert "Traceback" not in e.value.message
    assert e.value.reason == "PROMPT_TOO_LONG"


def made(cluster: LocalCluster) -> int:
    """Tokens that the engines have made, once all have nothing to do."""
    assert becomes(lambda: sum(r.running + r.waiting for r in cluster.reports()) == 0)
    return sum(r.generation_tokens for r in cluster.reports())


def test_a_deadline_reaches_the_engine(cluster: LocalCluster, client: Client):
    def late(i: int) -> bool:
        try:
            client.generate(f"on and on {i}", max_tokens=LONG, ignore_eos=True, timeout=0.3)
        except (DeadlineExceeded, ResourceExhausted):  # the engine refuses what has no chance
            return True
        return False

    before = made(cluster)
    with ThreadPoolExecutor(MANY) as asking:
        outcomes = list(asking.map(late, range(MANY)))
    assert any(outcomes)
    assert made(cluster) - before < MANY * LONG / 2


async def test_a_client_that_leaves_ends_its_request_in_the_engine(cluster: LocalCluster):
    before = await asyncio.to_thread(made, cluster)
    async with AsyncClient(cluster.address) as client:

        async def leave(i: int) -> None:
            async with await client.stream(
                f"on and on {i}", max_tokens=LONG, ignore_eos=True
            ) as stream:
                async for _ in stream:
                    break

        await asyncio.gather(*map(leave, range(MANY)))
        assert await asyncio.to_thread(made, cluster) - before < MANY * LONG / 2


def test_what_one_gateway_registers_all_serve_and_what_it_removes_none(
    cluster: LocalCluster, client: Client
):
    def served(gateway: Client, tokens: int = 2) -> bool:
        options = {"max_tokens": tokens, "ignore_eos": True}
        try:
            return len(gateway.generate("x", adapters={"fresh": 1.0}, **options).tokens) == tokens
        except NotFound:
            return False

    with Client(cluster.addresses[1], timeout=120) as other:
        digest = client.register_adapter("fresh", "reverse").digest
        assert becomes(lambda: served(other))
        with ThreadPoolExecutor(16) as asking:  # so many that both replicas are needed
            assert all(asking.map(lambda _: served(other, LONG), range(32)))
        assert becomes(lambda: all(digest in r.resident for r in cluster.reports()))
        other.unregister_adapter("fresh")
        assert not served(other)
        assert becomes(lambda: not served(client))


def test_a_killed_replica_costs_no_answer_and_comes_back(cluster: LocalCluster, client: Client):
    def answer(i: int) -> int:
        options = {"seed": i, "temperature": 0.8, "max_tokens": 150, "ignore_eos": True}
        return len(client.generate(f"tell me about number {i}", **options).tokens)

    with ThreadPoolExecutor(12) as asking:
        answers = [asking.submit(answer, i) for i in range(60)]
        assert becomes(lambda: any(a.done() for a in answers))
        cluster.kill_replicas()
        assert [a.result() for a in answers] == [150] * 60
    cluster.wait_for(2, 2 * SECONDS)
    assert len(cluster.reports()) == 2


def test_with_no_replica_left_calls_are_refused_and_those_at_work_wait(
    cluster: LocalCluster, client: Client
):
    def healthy() -> bool:
        return is_ready(client.health.Check(HEALTH, timeout=SECONDS))

    def refused() -> bool:
        try:
            client.generate("x", max_tokens=2, timeout=5)
        except Unavailable as e:
            return e.reason == "NO_REPLICA"
        except DeadlineExceeded:
            pass
        return False

    with ThreadPoolExecutor(1) as asking, client.stream("on", max_tokens=LONG, seed=1) as stream:
        next(iter(stream))
        rest = asking.submit(list, stream)
        cluster.kill_replicas(2)
        assert becomes(lambda: not healthy())
        assert refused()
        client.wait_until_ready(timeout=2 * SECONDS)
        rest.result()
        assert stream.usage.completion_tokens > 0
        assert client.generate("x", max_tokens=2, ignore_eos=True).tokens


def test_the_store_is_that_of_all(cluster: LocalCluster, client: Client):
    with Client(cluster.addresses[1]) as other:
        names = [a.name for a in client.list_adapters()]
        assert names == [a.name for a in other.list_adapters()] != []
