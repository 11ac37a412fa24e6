"""Servers with one registry: what one is told, the other does; without it, what they have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mora_serve import errors
from mora_serve.client import Client
from mora_serve.config import Config
from mora_serve.errors import ConfigError
from mora_serve.server.app import MoraServer
from tests.adapters.stores import go_down, memory_url, objects_of, stalled
from tests.server.conftest import Running, configuration, running, wait_for, write_adapter
from tests.server.process import SERVING, health


@pytest.fixture(scope="module")
def pair(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Running]]:
    store = {"store": memory_url(), "store_poll_seconds": 0.1}
    configs = [
        configuration(root, server={**store, "state": str(tmp_path_factory.mktemp("state"))})
        for _ in range(2)
    ]
    with running(configs[0]) as ours, running(configs[1]) as theirs:
        yield [ours, theirs]


def answers(client: Client, name: str) -> str | None:
    try:
        return client.generate("hello", adapters={name: 1.0}, max_tokens=8, temperature=0.0).text
    except errors.NotFound:
        return None


def test_what_is_registered_at_one_is_served_by_the_other_alike(pair: list[Running]) -> None:
    with pair[0].client() as ours, pair[1].client() as theirs:
        ours.register_adapter("rev", "rev", tasks=["turn"])
        wait_for(lambda: answers(theirs, "rev") is not None)
        assert answers(theirs, "rev") == answers(ours, "rev")
        assert theirs.generate("x", task="turn", max_tokens=1).decision.mixture.adapters
        theirs.unregister_adapter("rev")
        wait_for(lambda: answers(ours, "rev") is None)
        assert not ours.list_adapters()


def test_a_pin_at_one_holds_at_the_other(pair: list[Running]) -> None:
    with pair[0].client() as ours, pair[1].client() as theirs:
        ours.register_adapter("sum", "sum")
        ours.pin_adapter("sum", True)
        wait_for(lambda: any(a.name == "sum" and a.pinned for a in theirs.list_adapters()))
        wait_for(lambda: any(a.name == "sum" and a.resident for a in theirs.list_adapters()))
        theirs.unregister_adapter("sum")
        wait_for(lambda: not ours.list_adapters())


def test_without_the_store_adapters_are_served_and_changes_are_unavailable(
    pair: list[Running], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = pair[1].server._assembly.registry
    with pair[0].client() as ours, pair[1].client() as theirs:
        ours.register_adapter("rev", "rev")
        wait_for(lambda: answers(theirs, "rev") is not None)
        ours.upload_adapter("new", write_adapter(root / "unseen", seed=77))
        wait_for(lambda: len(theirs.list_adapters()) == 2)
        with monkeypatch.context() as m:
            go_down(registry, m)
            assert answers(theirs, "rev") == answers(ours, "rev")
            for change in (
                lambda: theirs.register_adapter("sum", "sum"),
                lambda: theirs.unregister_adapter("rev"),
                lambda: answers(theirs, "new"),  # it was not used here yet
            ):
                with pytest.raises(errors.Unavailable) as caught:
                    change()
                assert caught.value.reason == "STORE_UNAVAILABLE"
                assert "secret" not in str(caught.value)
        objects_of(registry)._failed = -10.0
        wait_for(lambda: answers(theirs, "new") is not None)
        for name in ("rev", "new"):
            theirs.unregister_adapter(name)
        wait_for(lambda: not ours.list_adapters())


def test_a_slow_store_makes_those_wait_who_need_it_and_nobody_else(
    pair: list[Running], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even for an adapter that is here and has to be loaded behind one that is not, though
    more ask for that one than there are threads.
    """
    registry = pair[1].server._assembly.registry
    fetched: list[str] = []
    fetch = registry.fetch

    def counted(digest: str) -> None:
        fetched.append(digest)
        fetch(digest)

    monkeypatch.setattr(registry, "fetch", counted)
    with pair[0].client() as ours, pair[1].client() as theirs:
        theirs.register_adapter("sum", "sum")  # here, but not on the device
        ours.upload_adapter("away", write_adapter(root / "away", seed=78))
        ours.register_adapter("rev", "rev")
        wait_for(lambda: len(theirs.list_adapters()) == 3)
        with stalled(registry) as store, ThreadPoolExecutor(8) as threads:
            try:
                slow = [threads.submit(answers, theirs, "away") for _ in range(6)]
                removal = threads.submit(theirs.unregister_adapter, "rev")
                store.wait_for(3)  # a fetch, a removal and the poller
                assert answers(theirs, "sum") is not None
                assert theirs.generate("hello", base=True, max_tokens=1).usage
                assert theirs.server_info().adapters == 3
                assert health(theirs) == SERVING
                assert not any(future.done() for future in (*slow, removal))
            finally:
                store.go_on.set()
            assert None not in [future.result(60) for future in slow]
            removal.result(60)
        assert len(fetched) == 1
        for name in ("sum", "away"):
            theirs.unregister_adapter(name)
        wait_for(lambda: not ours.list_adapters())


@pytest.mark.parametrize(
    ("store", "says"), [("http://127.0.0.1:9/x", "of kind 'http'"), ("here", "no URL")]
)
async def test_a_store_that_cannot_be_used_ends_the_start(
    configure: Callable[..., Config], store: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        async with MoraServer(configure(server={"store": store})):
            pass
