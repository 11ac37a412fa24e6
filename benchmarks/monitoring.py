"""What deploy/ asks Prometheus: the expressions of the rules and of the dashboard."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import ROOT

DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yml"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "mora-serve.json"
# What Grafana puts in place of its variables, where all of each are chosen.
VARIABLES = {"job": ".*", "instance": ".*", "adapter": ".*", "__rate_interval": "1m"}


@dataclass(frozen=True)
class Query:
    """One expression, and the panel, variable or rule that it is of."""

    title: str
    expression: str

    @property
    def metrics(self) -> frozenset[str]:
        """Names of the server's metrics in it."""
        # A name beside a colon is a recording rule's; what is quoted is a label's value.
        bare = re.sub(r'"[^"]*"', '""', self.expression)
        return frozenset(re.findall(r"(?<![\w:])mora_\w+(?![\w:])", bare))


def rules(path: Path = RULES) -> list[dict[str, Any]]:
    """All rules of a file, recording and alerting."""
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def rule_queries() -> list[Query]:
    """The rules' expressions."""
    return [Query(rule.get("record") or rule["alert"], rule["expr"]) for rule in rules()]


def panels() -> Iterator[dict[str, Any]]:
    """The dashboard's panels, those of collapsed rows included; no rows."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        yield from panel.get("panels", ())
        if panel["type"] != "row":
            yield panel


def panel_queries() -> list[Query]:
    """The panels' expressions, variables replaced."""
    return [
        Query(f"{panel['title']}: {target['legendFormat']}", substituted(target["expr"]))
        for panel in panels()
        for target in panel["targets"]
    ]


def variable_queries() -> list[Query]:
    """The series from which the dashboard's variables take their values."""
    found = []
    for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            selector = re.fullmatch(r"label_values\((.+), \w+\)", variable["query"]["query"])
            if selector is None:
                raise ValueError(f"variable {variable['name']}: not a label_values(...) query")
            found.append(Query(variable["name"], substituted(selector[1])))
    return found


def substituted(expression: str) -> str:
    """An expression as Grafana sends it. Raises KeyError for an unknown variable."""
    return re.sub(r"\$(\w+)", lambda match: VARIABLES[match[1]], expression)
