"""AsyncClient against a real server: each method once; Client is what the other tests use."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from mora_serve import errors
from mora_serve.client import AsyncClient
from mora_serve.core import Finish
from tests.server.conftest import LONGEST, OUTLASTING


@pytest.fixture
async def client(serving):
    tenant = f"t{uuid.uuid4().hex}"
    async with AsyncClient(serving.server.address, tenant=tenant, timeout=30) as client:
        yield client


async def test_the_life_of_an_adapter(client, root):
    await client.wait_until_ready(5)
    made = await client.register_adapter("rev", "rev")
    assert await client.get_adapter("rev") == made
    assert (await client.upload_adapter("up", root / "adapters/rev")).digest == made.digest
    assert (await client.update_adapter("rev", tasks=["a"])).card.tasks == ["a"]
    assert (await client.pin_adapter("rev")).pinned
    assert not (await client.pin_adapter("rev", False)).pinned
    assert [a.name for a in await client.list_adapters()] == ["rev", "up"]
    assert (await client.route("x", task="a")).mixture.adapters[0].digest == made.digest
    await client.unregister_adapter("rev")
    with pytest.raises(errors.NotFound, match="rev"):
        await client.get_adapter("rev")


async def test_a_stream_is_the_whole_answer(client):
    options = {"base": True, "max_tokens": 20, "ignore_eos": True}
    whole = await client.generate("hello", **options)
    async with await client.stream("hello", **options) as stream:
        assert stream.decision == whole.decision
        text = "".join([delta.text async for delta in stream])
    assert (text, stream.finish, stream.usage.completion_tokens) == (whole.text, Finish.LENGTH, 20)


async def test_a_cancelled_task_cancels_the_generation(serving, client):
    engine = serving.server._assembly.engine

    def idle() -> bool:
        stats = engine.stats()
        return stats.running == stats.waiting == 0

    before = engine.stats().generation_tokens
    options = {"base": True, **OUTLASTING}
    task = asyncio.ensure_future(client.generate("hello", **options))
    async with asyncio.timeout(20):
        while idle():
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while not idle():
            await asyncio.sleep(0.005)
    assert engine.stats().generation_tokens - before < LONGEST


async def test_server_and_router_are_described(client):
    info = await client.server_info(request_id="look")
    assert info.base.architecture == "llama"
    assert (await client.get_router()).digest == info.router_digest
    with pytest.raises(errors.InvalidArgument, match="router"):
        await client.load_router(data=b"no router")


async def test_errors_keep_their_kind(client):
    with pytest.raises(errors.NotFound) as caught:
        await client.generate("x", adapters={"none": 1.0})
    assert caught.value.field == "selection.mixture.adapters[0].adapter"
    with pytest.raises(errors.InvalidArgument, match="max_tokens"):
        await client.stream("x", base=True, max_tokens=100_000)
    with pytest.raises(errors.DeadlineExceeded):
        await client.generate("x", base=True, timeout=0.02, **OUTLASTING)
