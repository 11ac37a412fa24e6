"""The Helm chart, rendered by Helm's own library: valid, restricted, and what the server takes.

Needs the extra ``deploy`` (helm-python-sdk, kubernetes-validate); no cluster.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.monitoring import DASHBOARD, DEPLOY, RULES
from mora_serve import __version__
from mora_serve.cli import build_parser
from mora_serve.config import Config, ServerConfig, load_config
from mora_serve.server.ending import WAITING

helm = pytest.importorskip("helm_python", reason="the extra deploy is not installed")
kubernetes = pytest.importorskip("kubernetes_validate")

CHART = DEPLOY / "helm" / "mora-serve"
VALUES = {p.name.removesuffix("-values.yaml"): p for p in sorted(CHART.glob("ci/*.yaml"))}
KUBERNETES = ("1.29", "1.33", "1.37")
CUSTOM = {"ServiceMonitor", "PrometheusRule"}  # of Prometheus' operator


def values(name: str, **changes: Any) -> dict[str, Any]:
    return yaml.safe_load(VALUES[name].read_text()) | changes


def render(given: dict[str, Any]) -> list[dict[str, Any]]:
    """All objects of a release mora-serve in the namespace mora-serve."""
    with helm.Chart.load(str(CHART)) as chart:
        chart.validate_schema(given)
        files = chart.render(given, name="mora-serve", namespace="mora-serve")
    texts = [text for path, text in sorted(files.items()) if path.endswith(".yaml")]
    return [found for text in texts for found in yaml.safe_load_all(text) if found]


def one(objects: list[dict[str, Any]], kind: str, name: str = "mora-serve") -> dict[str, Any]:
    (found,) = (o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name)
    return found


def pod(objects: list[dict[str, Any]]) -> dict[str, Any]:
    return one(objects, "StatefulSet")["spec"]["template"]["spec"]


def configured(objects: list[dict[str, Any]], tmp_path: Path) -> Config:
    """What the server makes of the rendered configuration."""
    file = tmp_path / "mora.toml"
    file.write_text(one(objects, "ConfigMap")["data"]["mora.toml"])
    return load_config(file, {})


@pytest.fixture(params=VALUES)
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return render(values(request.param))


def test_helms_linter_finds_nothing():
    found = helm.lint(str(CHART))
    assert [m["error"] for m in found["messages"]] == ["icon is recommended"]
    assert found["errors"] == []


@pytest.mark.parametrize("version", KUBERNETES)
def test_each_object_fits_its_schema(objects: list[dict[str, Any]], version: str):
    """Strictly: a field that Kubernetes does not know is an error."""
    checked = [o for o in objects if o["kind"] not in CUSTOM]
    assert len(checked) >= 7
    for found in checked:
        kubernetes.validate(found, version, strict=True)


def test_a_field_that_kubernetes_does_not_know_would_be_found(objects: list[dict[str, Any]]):
    pod(objects)["terminationGracePeriod"] = 5
    with pytest.raises(kubernetes.ValidationError, match="terminationGracePeriod"):
        kubernetes.validate(one(objects, "StatefulSet"), KUBERNETES[-1], strict=True)


class TestConfiguration:
    def test_the_server_takes_it(self, objects: list[dict[str, Any]], tmp_path: Path):
        server = configured(objects, tmp_path).server
        ports = {p["name"]: p["containerPort"] for p in pod(objects)["containers"][0]["ports"]}
        assert server.host == server.metrics_host == "0.0.0.0"
        assert (server.port, server.metrics_port) == (ports["grpc"], ports["metrics"])
        assert server.http_port == ports.get("http", -1)

    def test_large_numbers_stay_whole(self, tmp_path: Path):
        config = configured(render(values("production")), tmp_path)
        assert config.engine.kv_bytes == 16 << 30
        assert config.adapters.require_sha256 is True

    @pytest.mark.parametrize("seconds", [2, 30, 90.5])
    def test_there_is_time_to_drain(self, seconds: float, tmp_path: Path):
        objects = render(values("demo", drainSeconds=seconds))
        server = configured(objects, tmp_path).server
        assert server.drain_seconds == seconds
        assert server.drain_wait_seconds == pytest.approx(WAITING * seconds)
        assert pod(objects)["terminationGracePeriodSeconds"] >= seconds + 10

    def test_every_file_that_it_names_is_mounted(
        self, objects: list[dict[str, Any]], tmp_path: Path
    ):
        config = configured(objects, tmp_path)
        mounts = [m["mountPath"] for m in pod(objects)["containers"][0]["volumeMounts"]]
        read = (config.server.tls_cert, config.server.tls_key, config.access.file)
        written = (config.server.state, config.adapters.root, config.access.audit)
        for path in filter(None, (*read, *written, config.base.model.removeprefix("demo"))):
            assert any(Path(path).is_relative_to(mount) for mount in mounts), path

    def test_values_of_the_chart_come_before_the_same_keys_of_its_configuration(
        self, tmp_path: Path
    ):
        given = values("demo", config={"server": {"port": 1, "max_message_bytes": 1 << 20}})
        server = configured(render(given), tmp_path).server
        assert (server.port, server.max_message_bytes) == (ServerConfig.port, 1 << 20)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tls": {"allowPlaintext": False}}, "tls.secretName"),
            ({"access": {"allowAnonymous": False}}, "access.secretName"),
        ],
    )
    def test_nobody_serves_in_the_open_without_saying_so(
        self, changes: dict[str, Any], message: str
    ):
        with pytest.raises(helm.HelmError, match=message):
            render(values("demo", **changes))

    @pytest.mark.parametrize(
        "changes",
        [
            {"replicas": 2},
            {"gpu": {"count": 2}},
            {"config": {"sever": {}}},
            {"drainSeconds": "30"},
            {"image": {"pullPolicy": "Sometimes"}},
        ],
        ids=str,
    )
    def test_values_that_mean_nothing_are_refused(self, changes: dict[str, Any]):
        with pytest.raises(helm.HelmError):
            render(values("demo", **changes))


class TestPod:
    def test_it_is_restricted(self, objects: list[dict[str, Any]]):
        """What the Pod Security Standard `restricted` asks for, and a root that is read only."""
        security = pod(objects)["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == 10001
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod(objects)["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
        assert pod(objects)["automountServiceAccountToken"] is False

    def test_its_command_is_one_that_the_command_line_takes(self, objects: list[dict[str, Any]]):
        (container,) = pod(objects)["containers"]
        assert build_parser().parse_args(container["args"]).command == "serve"
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            command = container[probe].get("exec", {}).get("command")
            if command:
                parsed = build_parser().parse_args(command[1:])
                assert parsed.command == "health"
                assert parsed.timeout < container[probe]["timeoutSeconds"]

    def test_health_is_asked_for_over_grpc_where_kubernetes_can(self):
        """Its own probes speak no TLS."""
        plain, secret = (
            pod(render(values(name)))["containers"][0] for name in ("demo", "production")
        )
        assert plain["readinessProbe"]["grpc"] == {"port": ServerConfig.port}
        assert "--tls-name=mora-serve.mora-serve.svc" in secret["readinessProbe"]["exec"]["command"]

    def test_it_asks_for_a_card_where_it_computes_on_one(self, tmp_path: Path):
        for name, device, count in (("demo", "cpu", None), ("production", "cuda", 1)):
            objects = render(values(name))
            (container,) = pod(objects)["containers"]
            assert configured(objects, tmp_path).base.device == device
            assert container["resources"]["limits"].get("nvidia.com/gpu") == count
            assert container["image"] == f"mora-serve:{__version__}-{device}"

    def test_another_configuration_is_another_pod(self):
        def checksum(**changes: Any) -> str:
            made = one(render(values("demo", **changes)), "StatefulSet")
            return made["spec"]["template"]["metadata"]["annotations"]["checksum/config"]

        assert checksum() == checksum(replicaCount=2)
        assert checksum() != checksum(drainSeconds=31)


class TestNetwork:
    def test_services_and_policies_name_ports_that_the_pod_has(self, objects: list[dict[str, Any]]):
        there = {p["name"] for p in pod(objects)["containers"][0]["ports"]}
        labels = one(objects, "StatefulSet")["spec"]["template"]["metadata"]["labels"]
        for name in ("mora-serve", "mora-serve-pods"):
            service = one(objects, "Service", name)["spec"]
            assert {p["targetPort"] for p in service["ports"]} <= there
            assert service["selector"].items() <= labels.items()
        policy = one(objects, "NetworkPolicy")["spec"]
        assert {p["port"] for rule in policy["ingress"] for p in rule["ports"]} == there
        assert policy["podSelector"]["matchLabels"].items() <= labels.items()
        assert one(objects, "StatefulSet")["spec"]["serviceName"] == "mora-serve-pods"

    def test_metrics_are_scraped_under_the_job_that_the_alerts_know(self):
        objects = render(values("production"))
        monitor = one(objects, "ServiceMonitor")["spec"]
        service = one(objects, "Service", "mora-serve-pods")
        labels = service["metadata"]["labels"]
        assert monitor["selector"]["matchLabels"].items() <= labels.items()
        assert {e["port"] for e in monitor["endpoints"]} <= {
            p["name"] for p in service["spec"]["ports"]
        }
        job = re.search(r'job=~"([^"]+)"', RULES.read_text())
        assert job is not None
        assert re.fullmatch(job[1], labels[monitor["jobLabel"]])


class TestMonitoring:
    def test_rules_and_dashboard_are_those_beside_the_chart(self):
        objects = render(values("production"))
        assert one(objects, "PrometheusRule")["spec"] == yaml.safe_load(RULES.read_text())
        dashboard = one(objects, "ConfigMap", "mora-serve-dashboard")["data"]
        assert dashboard["mora-serve.json"].strip() == DASHBOARD.read_text().strip()


def test_the_chart_has_the_servers_version():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__


def test_the_manifests_for_those_without_helm_are_the_charts():
    """Its first line has the command."""
    text = (DEPLOY / "kubernetes" / "mora-serve.yaml").read_text()
    order = lambda o: (o["kind"], o["metadata"]["name"])  # noqa: E731
    committed = sorted((o for o in yaml.safe_load_all(text) if o), key=order)
    assert committed == sorted(render(values("demo")), key=order)


def test_the_rendered_configuration_is_toml():
    text = one(render(values("demo")), "ConfigMap")["data"]["mora.toml"]
    assert set(tomllib.loads(text)) == {"access", "adapters", "base", "server"}
