"""The console's files, and what it asks that nobody else does. A browser: benchmarks/console.py."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from mora_serve.core import EngineStats
from mora_serve.http import console
from mora_serve.metrics import Metrics
from mora_serve.router.key_map import KeyMap
from tests.deploy.test_prometheus import sample_names
from tests.http.conftest import asking
from tests.server.conftest import Running

STATIC = Path(console.__file__).parent / "static"
MAP = "/console/map"


@pytest.fixture(scope="module")
def page() -> str:
    return (STATIC / "index.html").read_text()


def test_the_page_and_all_that_it_names_are_served(http: httpx.Client, page: str) -> None:
    assert http.get("/").text == page
    named = set(re.findall(r'"(/console/[^"]+)"', page))
    for script in STATIC.glob("*.js"):
        named |= set(re.findall(r'from "(/console/[^"]+)"', script.read_text()))
    assert {Path(n).name for n in named} == {f.name for f in STATIC.iterdir()} - {"index.html"}
    for path in named:
        answer = http.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-security-policy"] == console.POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_nothing_is_inline_and_nothing_comes_from_elsewhere(page: str) -> None:
    assert "style=" not in page
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=", page)
    for file in STATIC.iterdir():
        for url in re.findall(r"https?://[^\s\"'`)]+", file.read_text()):
            assert url.startswith("http://www.w3.org/")  # namespaces
    for script in STATIC.glob("*.js"):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(", script.read_text())


def test_every_element_that_scripts_look_for_is_there(page: str) -> None:
    ids = set(re.findall(r'id="([^"]+)"', page))
    for script in STATIC.glob("*.js"):
        wanted = set(re.findall(r'\$\("#([\w-]+)', script.read_text()))
        assert wanted <= ids, script.name


def test_every_metric_that_scripts_read_is_the_servers() -> None:
    """Of a histogram by its own name, to which they add what they need."""
    metrics = Metrics("1")
    metrics.watch(EngineStats, lambda digests: (), lambda: 0)
    served = sample_names(metrics.registry)
    read = {
        name
        for script in STATIC.glob("*.js")
        for name in re.findall(r'"(mora_\w+)"', script.read_text())
    }
    assert len(read) >= 10
    assert {name for name in read if not {name, f"{name}_bucket"} & served} == set()


def test_every_field_of_a_form_has_a_label(page: str) -> None:
    without = re.sub(r"<label.*?</label>", "", page, flags=re.S)
    assert not re.search(r"<(input|textarea|select)", without)


@pytest.mark.parametrize("name", ["other.js", "..%2fconsole.py", "%2e%2e/console.py", "index.htm"])
def test_no_other_file_is_served(http: httpx.Client, name: str) -> None:
    answer = http.get(f"/console/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "no_such_path"


def test_the_map_has_the_adapters_and_the_text(demo: Running) -> None:
    with asking(demo) as http:
        drawn = http.post(MAP, json={"text": "reverse 'kavo'"}).json()
        names = {a["name"] for a in drawn["adapters"]}
        with demo.client() as client:
            assert names == {a.name for a in client.list_adapters() if a.routable}
        assert len(drawn["text"]) == 2
        assert 0 < drawn["share"] <= 1
        assert all(len(p) == 2 for a in drawn["adapters"] for p in (a["point"], *a["prototypes"]))
        assert http.post(MAP, json={}).json()["text"] is None
        refused = http.post(MAP, json={"texts": "x"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "texts")
        with asking(demo, **{"mora-tenant": "another"}) as other:
            assert other.post(MAP, json={"text": "x"}).json()["adapters"] == []


def test_the_map_is_written_on_a_thread(demo: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have thousands of points: they would keep everybody waiting."""
    write, threads = console.map_object, []

    def written(drawn: KeyMap | None) -> dict[str, Any]:
        threads.append(threading.current_thread().name)
        return write(drawn)

    monkeypatch.setattr(console, "map_object", written)
    with asking(demo) as http:
        assert http.post(MAP, json={}).json()["adapters"]
    assert [name.partition("_")[0] for name in threads] == ["route"]


def test_without_a_router_the_map_is_empty(http: httpx.Client) -> None:
    assert http.post(MAP, json={"text": "x"}).json() == {"adapters": [], "share": 0.0, "text": None}
