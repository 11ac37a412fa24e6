"""Configurations of Ray Serve, of KubeRay and of Envoy: what the code has is what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mora_serve.config import load_config

RAY = Path(__file__).parents[2] / "deploy" / "ray"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((RAY / name).read_text()))


def found(kind: str) -> dict[str, Any]:
    return next(d for d in documents("kuberay.yaml") if d["kind"] == kind)


def serve_config(text: str) -> dict[str, Any]:
    """The application's arguments, once Ray has taken the configuration where it is installed."""
    config = yaml.safe_load(text)
    try:
        from ray.serve.schema import ServeDeploySchema
    except ModuleNotFoundError:
        pass
    else:
        ServeDeploySchema.model_validate(config)
    [application] = config["applications"]
    assert application["import_path"] == "mora_serve.cluster:app"
    assert config["proxy_location"] == "Disabled"
    return application["args"]


def test_the_application_has_a_configuration_of_ours():
    args = serve_config((RAY / "serve.yaml").read_text())
    config = load_config(environ={}, flags=args)
    assert config.cluster.replicas == 2
    assert config.server.state
    reserved = 2 * config.cluster.cpus + config.cluster.gateways * config.cluster.gateway_cpus
    assert reserved <= 2  # a small machine: Ray would wait for more without end


def test_kuberays_application_reads_the_mounted_configuration(tmp_path: Path):
    service, files = found("RayService"), found("ConfigMap")["data"]
    args = serve_config(service["spec"]["serveConfigV2"])
    (tmp_path / "mora.toml").write_text(files["mora.toml"])
    config = load_config(tmp_path / "mora.toml", environ={})
    mounts = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    paths = {m["mountPath"] for m in mounts["containers"][0]["volumeMounts"]}
    assert str(Path(args["config"]).parent) in paths
    assert {config.server.state, str(Path(config.access.file).parent)} <= paths


def test_each_deployment_fits_its_group_of_workers(tmp_path: Path):
    (tmp_path / "mora.toml").write_text(found("ConfigMap")["data"]["mora.toml"])
    config = load_config(tmp_path / "mora.toml", environ={})
    ray = found("RayService")["spec"]["rayClusterConfig"]
    gateways, replicas = ray["workerGroupSpecs"]
    assert gateways["maxReplicas"] == config.cluster.gateways
    assert (replicas["minReplicas"], replicas["maxReplicas"]) == (
        config.cluster.replicas,
        config.cluster.max_replicas,
    )
    assert float(gateways["rayStartParams"]["num-cpus"]) == config.cluster.gateway_cpus
    assert float(replicas["rayStartParams"]["num-cpus"]) == config.cluster.cpus
    assert float(replicas["rayStartParams"]["num-gpus"]) == config.cluster.gpus


@pytest.mark.parametrize("kind", ["Service", "NetworkPolicy"])
def test_the_gateways_port_is_the_servers(kind: str, tmp_path: Path):
    (tmp_path / "mora.toml").write_text(found("ConfigMap")["data"]["mora.toml"])
    port = load_config(tmp_path / "mora.toml", environ={}).server.port
    assert f"'port': {port}" in str(found(kind)["spec"])
    [envoy] = documents("envoy.yaml")
    [cluster] = envoy["static_resources"]["clusters"]
    [endpoint] = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    address = endpoint["endpoint"]["address"]["socket_address"]
    assert address == {"address": found("Service")["metadata"]["name"], "port_value": port}


def pods() -> list[dict[str, Any]]:
    ray = found("RayService")["spec"]["rayClusterConfig"]
    groups = [ray["headGroupSpec"], *ray["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_every_pod_can_write_what_it_shares_and_is_probed_without_more_than_the_image_has():
    image = (RAY.parent / "docker" / "Dockerfile").read_text()
    for pod in pods():
        assert f"USER {pod['securityContext']['runAsUser']}:" in image
        assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
        [container] = pod["containers"]
        for probe in (container["readinessProbe"], container["livenessProbe"]):
            assert "httpGet" in probe  # KubeRay's own, where there is none, runs wget


def test_the_operator_reaches_the_dashboard():
    head = found("RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]
    assert head["rayStartParams"].get("dashboard-host", "0.0.0.0") == "0.0.0.0"
    rules = found("NetworkPolicy")["spec"]["ingress"]
    [ports] = [rule["ports"] for rule in rules if "operator" in str(rule["from"])]
    assert ports == [{"port": 8265}]


def test_rays_own_ports_are_for_its_own_pods():
    rules = found("NetworkPolicy")["spec"]["ingress"]
    config = load_config(environ={}).server
    for rule in rules:
        [source] = rule["from"]
        if source.get("podSelector", {}).get("matchLabels") == {"ray.io/is-ray-node": "yes"}:
            continue
        [port] = [port["port"] for port in rule["ports"]]
        assert port in (config.port, config.metrics_port) or "operator" in str(source)
