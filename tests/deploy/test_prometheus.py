"""Rules and dashboard ask for what a server has, in Prometheus' language, as promtool reads it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from benchmarks import monitoring
from mora_serve.core import EngineStats
from mora_serve.metrics import Metrics

PROMETHEUS = monitoring.DEPLOY / "prometheus"
QUERIES = [*monitoring.rule_queries(), *monitoring.panel_queries(), *monitoring.variable_queries()]
ALERTS = [rule for rule in monitoring.rules() if "alert" in rule]
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def sample_names(registry: CollectorRegistry) -> set[str]:
    """Names of all samples that a registry can have."""
    return {f.name + suffix for f in registry.collect() for suffix in SUFFIXES[f.type]}


def promtool(*arguments: Any, **options: Any) -> str:
    """What it says, when it finds nothing wrong."""
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run(
        [tool, *map(str, arguments)], capture_output=True, text=True, cwd=PROMETHEUS, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class TestMetrics:
    @pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.title)
    def test_each_one_that_is_asked_for_is_declared(self, query: monitoring.Query):
        metrics = Metrics("1")
        metrics.watch(EngineStats, lambda digests: (), lambda: 0)
        assert query.metrics <= sample_names(metrics.registry)

    def test_a_name_that_no_server_has_would_be_found(self):
        query = monitoring.Query("", "rate(mora_tokens_total[5m]) / job:mora_steps:rate5m")
        assert query.metrics == {"mora_tokens_total"}

    def test_the_dashboard_shows_every_metric_but_those_about_the_build(self):
        metrics = Metrics("1")
        metrics.watch(EngineStats, lambda digests: (), lambda: 0)
        shown = {name for query in monitoring.panel_queries() for name in query.metrics}
        hidden = {
            family.name
            for family in metrics.registry.collect()
            if not {family.name + s for s in SUFFIXES[family.type]} & shown
        }
        # The endpoint picker's; a look at the books that finds nothing.
        assert hidden == {"mora_kv_cache_page_tokens", "mora_engine_integrity_checks"}


class TestRules:
    def test_promtool_takes_them(self):
        assert f"{len(monitoring.rules())} rules found" in promtool("check", "rules", "rules.yml")

    def test_promtool_takes_the_configuration(self):
        promtool("check", "config", "prometheus.yml")

    def test_their_unit_tests_pass(self):
        assert "SUCCESS" in promtool("test", "rules", "tests.yml")

    def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not(self):
        fires, quiet = set(), set()
        for case in yaml.safe_load((PROMETHEUS / "tests.yml").read_text())["tests"]:
            for check in case.get("alert_rule_test", ()):
                (fires if check["exp_alerts"] else quiet).add(check["alertname"])
        assert fires == quiet == {rule["alert"] for rule in ALERTS}

    def test_each_recording_rule_has_a_case(self):
        cases = (PROMETHEUS / "tests.yml").read_text()
        assert all(rule["record"] in cases for rule in monitoring.rules() if "record" in rule)

    @pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
    def test_each_alert_says_how_bad_it_is_and_where_its_remedy_stands(self, rule: dict[str, Any]):
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"]
        path, _, anchor = rule["annotations"]["runbook"].partition("#")
        runbook = (monitoring.DEPLOY.parent / path).read_text()
        sections = dict(re.findall(r"^## (\w+)\n\n(.+?)(?=\n## |\Z)", runbook, re.M | re.S))
        assert anchor == rule["alert"].lower()
        assert len(sections[rule["alert"]]) > 100


class TestDashboard:
    def test_prometheus_can_parse_each_expression(self, tmp_path: Path):
        rules = [
            {"record": f"panel:number{i}", "expr": query.expression}
            for i, query in enumerate(monitoring.panel_queries())
        ]
        file = tmp_path / "panels.yml"
        file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
        assert f"{len(rules)} rules found" in promtool("check", "rules", file)

    def test_an_expression_that_is_none_would_be_found(self, tmp_path: Path):
        file = tmp_path / "panels.yml"
        rule = {"record": "a:b", "expr": "sum by (le (rate(mora_engine_steps_total[1m]))"}
        file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": [rule]}]}))
        with pytest.raises(AssertionError, match="parse"):
            promtool("check", "rules", file)

    def test_panels_stand_beside_each_other_and_tell_what_they_show(self):
        taken: set[tuple[int, int]] = set()
        numbers = set()
        for panel in json.loads(monitoring.DASHBOARD.read_text())["panels"]:
            place = panel["gridPos"]
            cells = {
                (place["x"] + i, place["y"] + j)
                for i in range(place["w"])
                for j in range(place["h"])
            }
            assert place["x"] + place["w"] <= 24
            assert not taken & cells, panel["title"]
            taken |= cells
            numbers.add(panel["id"])
            assert panel["type"] == "row" or panel["description"]
        assert len(numbers) == len(json.loads(monitoring.DASHBOARD.read_text())["panels"])

    def test_it_takes_the_data_source_that_is_provisioned(self):
        provisioning = monitoring.DEPLOY / "grafana" / "provisioning"
        text = (provisioning / "datasources" / "prometheus.yaml").read_text()
        (source,) = yaml.safe_load(text)["datasources"]
        variables = json.loads(monitoring.DASHBOARD.read_text())["templating"]["list"]
        assert variables[0]["type"] == "datasource"
        assert variables[0]["query"] == source["type"]
        assert variables[0]["current"]["value"] == source["uid"]
        for panel in monitoring.panels():
            assert {t["datasource"]["uid"] for t in panel["targets"]} == {"${datasource}"}
