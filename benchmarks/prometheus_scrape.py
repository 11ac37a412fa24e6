"""Prometheus scrapes a live server for a minute, with deploy/'s configuration, rules and dashboard.

A real server with the bundled models, the machine's own prometheus and promtool, and traffic of
every kind meanwhile: routed, explicit, by task, of the base, and some that is refused. Then every
expression of the rules and of the dashboard is asked. Prometheus has to have counted the tokens
that the client was told.

    python -m benchmarks.prometheus_scrape --json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks import monitoring, report
from benchmarks.metrics import samples
from mora_serve.client import Client
from mora_serve.demo.bundle import bundle_path, read_examples
from mora_serve.demo.process import ServerProcess, free_port
from mora_serve.errors import MoraError

SECONDS = 60.0
PACE = 0.25  # seconds between two requests; a bound on their number
SLOTS = 6  # fewer than the bundle's adapters: some are loaded again and again
SETTLE = 20.0  # at most, until what was counted last has been scraped
TOOLS = ("prometheus", "promtool")


def main() -> None:
    """Serve, scrape, ask, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.parse_args()
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"{', '.join(missing)}: not installed; Debian's package is prometheus")
    report.emit({**measure(), "environment": report.environment()})


def measure() -> dict[str, Any]:
    """One server, one Prometheus, a minute."""
    with tempfile.TemporaryDirectory(prefix="mora-prometheus-") as name:
        port = free_port()
        flags = {
            "server.metrics_port": port,
            "server.state": Path(name, "state"),
            "server.log_calls": "false",
            "adapters.slots": SLOTS,
            "router.feedback": "true",
        }
        with ServerProcess(flags) as process, Client(process.address) as client:
            process.wait_until_ready(client)
            with prometheus(Path(name), port) as ask:
                start = time.monotonic()
                traffic = drive(client)
                counted = settled(ask, traffic["tokens"])
                seconds = time.monotonic() - start
                return {
                    "seconds": round(seconds, 1),
                    **traffic,
                    "tokens_prometheus_counted": counted,
                    "tokens_differ": counted != traffic["tokens"],
                    **answers(ask),
                    **exposition(port),
                }


def drive(client: Client) -> dict[str, int]:
    """Requests of every kind, one after another; what came of them."""
    examples = [e for e in read_examples(bundle_path()) if e.kind != "abstain"]
    adapters = [a.name for a in client.list_adapters()]
    tokens = asked = refused = 0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and asked < SECONDS / PACE:
        prompt = examples[asked % len(examples)].prompt
        name = adapters[asked % len(adapters)]
        kinds: tuple[dict[str, Any], ...] = (
            {},
            {"adapters": {name: 1.0}},
            {"base": True},
            {"adapters": {name: 0.5, adapters[(asked + 1) % len(adapters)]: 0.5}},
            {"task": name},
            {"adapters": {"no-such-adapter": 1.0}},
        )
        try:
            answer = client.generate(prompt, max_tokens=24, **kinds[asked % len(kinds)])
            tokens += answer.usage.completion_tokens
        except MoraError:
            refused += 1
        asked += 1
        time.sleep(PACE)
    return {"requests": asked, "refused": refused, "tokens": tokens}


def settled(ask: Ask, tokens: int) -> int:
    """What Prometheus has counted in the end: tokens sampled, those at ends of answers besides."""
    end = time.monotonic() + SETTLE
    found = -1
    while time.monotonic() < end:
        found = int(ask.value("mora_generation_tokens_total"))
        if found == tokens:
            break
        time.sleep(1.0)
    return found


def answers(ask: Ask) -> dict[str, Any]:
    """Every expression of deploy/: which Prometheus refuses, and which give something."""
    panels, variables = monitoring.panel_queries(), monitoring.variable_queries()
    refused, empty = [], []
    for query in (*panels, *variables):
        try:
            if not ask.series(query.expression):
                empty.append(query.title)
        except ValueError:
            refused.append(query.title)
    groups = ask.get("rules", {})["groups"]
    evaluated = [rule for group in groups for rule in group["rules"]]
    alerts = ask.get("alerts", {})["alerts"]
    return {
        "up": ask.value("up"),
        "tokens_per_second": ask.value("sum(rate(mora_generation_tokens_total[1m]))"),
        "first_token_p95_seconds": ask.value(
            "histogram_quantile(0.95, rate(mora_time_to_first_token_seconds_bucket[1m]))"
        ),
        "rules": len(evaluated),
        "rules_unhealthy": sum(rule["health"] != "ok" for rule in evaluated),
        # Slots are meant to be too few: that becomes an alert where it lasts.
        "alerts_pending": [a["labels"]["alertname"] for a in alerts if a["state"] == "pending"],
        "alerts_firing": sum(a["state"] == "firing" for a in alerts),
        "queries": len(panels) + len(variables),
        "queries_refused": len(refused),
        "queries_with_data": len(panels) + len(variables) - len(refused) - len(empty),
        "queries_empty": empty,
    }


def exposition(port: int) -> dict[str, Any]:
    """What promtool says of the page, and which metrics are named and not on it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as page:
        text = page.read()
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    said = (checked.stdout + checked.stderr).decode().splitlines()
    there = {sample.name for sample in samples(port)}
    named = {
        metric
        for query in (*monitoring.rule_queries(), *monitoring.panel_queries())
        for metric in query.metrics
    }
    # Counters with labels that nothing has happened to have a line of their type only.
    typed = {line.split()[2] for line in text.decode().splitlines() if line.startswith("# TYPE ")}
    return {
        "promtool_complaints": len(said) or checked.returncode,
        "metrics_named": len(named),
        "metrics_missing": sorted(named - there - typed),
        "metrics_missing_count": len(named - there - typed),
    }


class Ask:
    """Prometheus' HTTP API on loopback."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}/api/v1"

    def get(self, what: str, arguments: dict[str, str]) -> Any:
        """The data of an answer. Raises ValueError for a query that is refused."""
        url = f"{self._base}/{what}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - loopback
                return json.load(answer)["data"]
        except urllib.error.HTTPError as e:
            raise ValueError(e.read().decode()) from None

    def series(self, expression: str) -> list[Any]:
        """What an instant query gives."""
        found: list[Any] = self.get("query", {"query": expression})["result"]
        return found

    def value(self, expression: str) -> float:
        """The value of the only series; -1 for none, or for no number."""
        found = self.series(expression)
        value = float(found[0]["value"][1]) if len(found) == 1 else math.nan
        return -1.0 if math.isnan(value) else value


@contextlib.contextmanager
def prometheus(directory: Path, target: int) -> Iterator[Ask]:
    """Prometheus with deploy/'s configuration, scraping a port of loopback."""
    config = yaml.safe_load((monitoring.DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["rule_files"] = [str(monitoring.RULES)]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{target}"]}]
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={path}",
        f"--storage.tsdb.path={directory / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield _when_ready(process, port)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _when_ready(process: subprocess.Popen[bytes], port: int) -> Ask:
    for _ in range(120):
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5).close()
            return Ask(port)
        time.sleep(0.5)
    raise RuntimeError("Prometheus did not start; what it says stands above")


if __name__ == "__main__":
    main()
