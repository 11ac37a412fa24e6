"""The manifests for the Kubernetes gateway fit the chart, and name metrics that a server has."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from benchmarks.monitoring import DEPLOY
from mora_serve.config import ServerConfig
from mora_serve.core import EngineStats
from mora_serve.metrics import Metrics

GATEWAY = DEPLOY / "kubernetes" / "gateway"
OBJECTS = [
    found
    for path in (*sorted(GATEWAY.glob("*.yaml")), DEPLOY / "kubernetes" / "namespace.yaml")
    for found in yaml.safe_load_all(path.read_text())
]
CUSTOM = ("HTTPRoute", "InferenceObjective", "InferencePool")
VALUES = yaml.safe_load((DEPLOY / "helm" / "mora-serve" / "ci" / "gateway-values.yaml").read_text())


def one(kind: str, name: str = "mora-serve") -> dict[str, Any]:
    (found,) = (o for o in OBJECTS if o["kind"] == kind and o["metadata"]["name"] == name)
    return found


def picker() -> dict[str, Any]:
    return yaml.safe_load(one("ConfigMap", "mora-serve-epp")["data"]["plugins.yaml"])


@pytest.mark.parametrize("found", OBJECTS, ids=lambda o: f"{o['kind']}-{o['metadata']['name']}")
def test_each_object_fits_its_schema(found: dict[str, Any]):
    """Those of Kubernetes itself; deploy/README.md says how the others were checked."""
    kubernetes = pytest.importorskip("kubernetes_validate", reason="the extra deploy is missing")
    if found["kind"] in CUSTOM:
        with pytest.raises(kubernetes.SchemaNotFoundError):
            kubernetes.validate(found, "1.33", strict=True)
    else:
        kubernetes.validate(found, "1.33", strict=True)


def test_the_picker_reads_metrics_that_a_server_has():
    """Under the specs that its core-metrics-extractor knows, and as gauges, which it asks for."""
    metrics = Metrics("1")
    stats = EngineStats(kv_pages=100, page_size=16, slots=8)
    metrics.watch(lambda: stats, lambda digests: (), lambda: 0)
    gauges = {f.name: f for f in metrics.registry.collect() if f.type == "gauge"}
    (extractor,) = (p for p in picker()["plugins"] if p["type"] == "core-metrics-extractor")
    (engine,) = extractor["parameters"]["engineConfigs"]
    specs = {key: value for key, value in engine.items() if key.endswith("Spec")}
    assert set(specs) == {
        *("queuedRequestsSpec", "runningRequestsSpec", "kvUsageSpec", "loraSpec"),
        *("cacheBlockSizeSpec", "cacheNumBlocksSpec"),
    }
    assert set(specs.values()) <= set(gauges)
    (size,) = gauges[specs["cacheBlockSizeSpec"]].samples
    assert size.value == stats.page_size
    (adapters,) = gauges[specs["loraSpec"]].samples
    assert set(adapters.labels) == {*("max_lora", "running_lora_adapters", "waiting_lora_adapters")}
    assert engine["name"] == extractor["parameters"]["defaultEngine"]
    assert engine["name"] == VALUES["podLabels"]["inference.networking.k8s.io/engine-type"]


def test_every_plugin_that_is_used_is_declared():
    config = picker()
    declared = {p["type"] for p in config["plugins"]}
    used = {p["pluginRef"] for profile in config["schedulingProfiles"] for p in profile["plugins"]}
    for source in config["dataLayer"]["sources"]:
        used |= {source["pluginRef"], *(e["pluginRef"] for e in source["extractors"])}
    assert used == declared


def test_the_pool_the_picker_and_the_route_find_each_other():
    pool = one("InferencePool")["spec"]
    service = one("Service", "mora-serve-epp")["spec"]
    deployment = one("Deployment", "mora-serve-epp")["spec"]["template"]
    (container,) = deployment["spec"]["containers"]
    assert pool["endpointPickerRef"]["name"] == "mora-serve-epp"
    assert pool["endpointPickerRef"]["port"]["number"] in [p["port"] for p in service["ports"]]
    assert service["selector"].items() <= deployment["metadata"]["labels"].items()
    assert {"--pool-name=mora-serve", "--config-file=/config/plugins.yaml"} <= set(
        container["args"]
    )
    assert f"--model-server-metrics-port={ServerConfig.metrics_port}" in container["args"]
    (rule,) = one("HTTPRoute")["spec"]["rules"]
    assert [b["name"] for b in rule["backendRefs"]] == ["mora-serve"]
    for name in ("interactive", "batch"):
        assert one("InferenceObjective", name)["spec"]["poolRef"]["name"] == "mora-serve"


def test_the_pool_selects_the_charts_pods_on_their_http_port():
    chart = yaml.safe_load((DEPLOY / "helm" / "mora-serve" / "values.yaml").read_text())
    pool = one("InferencePool")["spec"]
    assert pool["targetPorts"] == [{"number": chart["http"]["port"]}]
    assert pool["selector"]["matchLabels"] == {
        "app.kubernetes.io/name": "mora-serve",
        "app.kubernetes.io/instance": "mora-serve",
    }
    assert VALUES["http"]["enabled"] is True


def test_the_servers_let_the_picker_read_their_metrics():
    labels = one("Deployment", "mora-serve-epp")["spec"]["template"]["metadata"]["labels"]
    selectors = [
        peer["podSelector"]["matchLabels"]
        for peer in VALUES["networkPolicy"]["metricsFrom"]
        if "podSelector" in peer
    ]
    assert selectors
    assert all(selector.items() <= labels.items() for selector in selectors)
