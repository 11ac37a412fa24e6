"""Our request router inside Ray Serve's: what it takes from the replicas, and what it answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mora_serve.core import AdapterWeight, Mixture, Request

pytest.importorskip("ray.serve", reason="Ray is not installed: pip install 'mora-serve[ray]'")

from mora_serve.cluster.affinity import AffinityRouter  # imports ray


class Router(AffinityRouter):
    """Without the rest of Serve's: queues as they are set."""

    def __init__(self, queues: dict[str, int]) -> None:
        self._queues = queues
        self.initialize_state(spill=1.25)

    @property
    def replica_queue_len_cache(self) -> Any:
        return SimpleNamespace(get=lambda key: self._queues.get(key.unique_id))


def replica(name: str, *resident: str, slots: int = 4) -> Any:
    stats = {"resident": list(resident), "slots": slots}
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name), routing_stats=stats)


def pending(*digests: str) -> Any:
    weights = tuple(AdapterWeight(d, 1.0, d) for d in digests)
    context = SimpleNamespace(should_backoff=False)
    request = Request("r", (1,), mixture=Mixture(weights))
    return SimpleNamespace(args=[request, None], routing_context=context)


async def first(router: Router, replicas: list[Any], *digests: str) -> str:
    [[chosen], rest] = await router.choose_replicas(replicas, pending(*digests))
    assert rest == replicas
    return str(chosen.replica_id.unique_id)


async def test_a_mixture_goes_to_where_its_adapters_are() -> None:
    router, replicas = Router({}), [replica("one", "a"), replica("two", "b")]
    assert await first(router, replicas, "a") == "one"
    assert await first(router, replicas, "b") == "two"
    replicas[0].routing_stats, replicas[1].routing_stats = (
        replicas[1].routing_stats,
        replicas[0].routing_stats,
    )
    assert await first(router, replicas, "a") == "two"


async def test_a_long_line_is_passed_over() -> None:
    router = Router({"one": 30, "two": 1})
    assert await first(router, [replica("one", "a"), replica("two")], "a") == "two"


async def test_what_has_been_sent_counts_as_resident_before_the_next_report() -> None:
    router, replicas = Router({}), [replica("one"), replica("two")]
    home = await first(router, replicas, "a")
    other = next(r for r in replicas if r.replica_id.unique_id != home)
    router.on_request_routed(pending("a"), other.replica_id, None)
    assert await first(router, replicas, "a") == other.replica_id.unique_id


async def test_a_report_ends_what_was_only_thought_to_be_resident() -> None:
    router, replicas = Router({}), [replica("one"), replica("two", "b")]
    router._look({"one": replicas[0], "two": replicas[1]})
    router.on_request_routed(pending("a"), replicas[0].replica_id, None)
    assert await first(router, replicas, "a") == "one"
    replicas[0].routing_stats = {**replicas[0].routing_stats, "misses": 1}  # it came, and went
    router._look({"one": replicas[0], "two": replicas[1]})
    assert not router._fleet.holding("a")


async def test_replicas_come_and_go() -> None:
    router, one, two = Router({}), replica("one", "a"), replica("two")
    two.routing_stats = None  # it has not reported yet
    assert await first(router, [one, two], "a") == "one"
    assert await first(router, [two], "a") == "two"
    router.on_request_routed(pending("a"), one.replica_id, None)  # its answer was on its way
    assert await first(router, [one, two], "a") == "one"


async def test_calls_that_are_no_requests_go_to_the_less_loaded() -> None:
    router = Router({"one": 9, "two": 1})
    call = SimpleNamespace(args=[["a text"]], routing_context=SimpleNamespace())
    [[chosen], _] = await router.choose_replicas([replica("one"), replica("two")], call)
    assert chosen.replica_id.unique_id == "two"
