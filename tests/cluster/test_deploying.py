"""What Ray Serve is asked for."""

from __future__ import annotations

import queue
from typing import Any

import pytest

from mora_serve.cluster import app, replica
from mora_serve.config import DEFAULT_SPILL, Config
from mora_serve.errors import ConfigError
from mora_serve.server import ending

pytest.importorskip("ray.serve", reason="Ray is not installed: pip install 'mora-serve[ray]'")


def deployments(**keys: Any) -> tuple[Any, Any]:
    """Gateway and replica of an application; keys with ``__`` for the dot."""
    args = {key.replace("__", "."): value for key, value in keys.items()}
    gateway = app(args)._bound_deployment
    return gateway, gateway.init_args[1]._bound_deployment


def test_without_a_shared_store_nothing_is_deployed():
    with pytest.raises(ConfigError) as e:
        app({})
    assert e.value.field == "server.store"


def test_an_unknown_key_is_an_error():
    with pytest.raises(ConfigError, match=r"cluster\.replicas"):
        app({"cluster.replica": 2})


def test_a_fixed_number_of_replicas_with_ours_as_the_router():
    _, made = deployments(server__state="/s", cluster__replicas="3", cluster__gpus=1)
    assert made.num_replicas == 3
    assert made.ray_actor_options["num_gpus"] == 1
    router = made._deployment_config.request_router_config
    assert router.request_router_class == "mora_serve.cluster.affinity.AffinityRouter"
    assert router.request_router_kwargs == {"spill": DEFAULT_SPILL}


def test_more_replicas_by_the_requests_at_work():
    _, made = deployments(
        server__state="/s", cluster__replicas=2, cluster__max_replicas=8, engine__max_batch=16
    )
    scaling = made._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 8)
    assert scaling.target_ongoing_requests == 16


def test_affinity_can_be_left_to_rays_router():
    _, made = deployments(server__state="/s", cluster__affinity=False)
    assert "PowerOfTwo" in str(made._deployment_config.request_router_config.request_router_class)


def test_gateways_with_a_fixed_port_are_on_nodes_of_their_own():
    def most(**keys: Any) -> Any:
        return deployments(server__state="/s", **keys)[0]._replica_config.max_replicas_per_node

    assert most() == 1
    assert most(server__port=0) == 1  # there is that of the metrics
    assert most(server__port=0, server__metrics_port=0) is None
    assert most(server__port=0, server__metrics_port=-1, server__http_port=8000) == 1


def test_a_replica_whose_engine_is_gone_ends_its_process(monkeypatch: pytest.MonkeyPatch):
    from mora_serve.cluster import deploying

    told: list[Any] = []
    ends: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(replica, "Replica", lambda *args: told.extend(args))
    monkeypatch.setattr(ending, "end_now", ends.put)
    monkeypatch.setattr(deploying.logs, "configure", lambda *args: None)
    monkeypatch.delattr(deploying.ReplicaDeployment, "__del__")  # Serve's to call
    deploying.ReplicaDeployment(Config())
    told[-1]()
    assert ends.get(timeout=30) == ending.ENGINE_FAILED
