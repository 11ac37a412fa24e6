"""``python -m router_training evaluate``: what is checked first, and what comes out first."""

from __future__ import annotations

import json

import pytest

from mora_serve.demo.bundle import bundle_path
from router_training.__main__ import main

QUALITY = {"tasks": {"rev": {"base": 0.25}}, "router": {"known_top1": 0.75}, "seed": 7}


@pytest.fixture
def unmeasured(monkeypatch):
    """Fail where anything is measured."""

    def measure(*args):
        pytest.fail("measured before what was given was checked")

    monkeypatch.setattr("router_training.demo.evaluate.demo_subject", measure)


def refused(capsys, *arguments):
    """The one line that a run ends with."""
    assert main(["evaluate", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    return err


@pytest.mark.parametrize("manifest", [None, "no json", "[]", '{"adapters": [{}]}', "{}"])
def test_a_directory_that_is_no_bundle_is_refused(tmp_path, unmeasured, capsys, manifest):
    """With the remedy and without the path; no page is begun."""
    bundle, page = tmp_path / "wrong", tmp_path / "page.html"
    bundle.mkdir()
    if manifest is not None:
        (bundle / "bundle.json").write_text(manifest)
    line = refused(capsys, bundle, "--report", page)
    assert line.startswith("bundle: wrong holds no bundle.json that can be read; give ")
    assert str(tmp_path) not in line
    assert not page.exists()


@pytest.mark.parametrize("name", ["file/page.html", "directory"])
def test_a_page_that_cannot_be_written_is_refused_before_measuring(
    tmp_path, unmeasured, capsys, name
):
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    line = refused(capsys, bundle_path(), "--report", tmp_path / name)
    assert line.startswith("report: ")
    assert line.endswith("; give another file\n")
    assert str(tmp_path) not in line


def test_figures_are_out_before_the_page_is_drawn(tmp_path, monkeypatch, capsys):
    """A page that fails costs no figures; its directory is made."""
    page = tmp_path / "new" / "page.html"
    seen = []

    def draw(file, quality):
        seen.append((file, json.loads(capsys.readouterr().out), quality))

    monkeypatch.setattr("router_training.demo.evaluate.evaluate", lambda *args: QUALITY)
    monkeypatch.setattr("router_training.demo.report.write_page", draw)
    assert main(["evaluate", str(bundle_path()), "--report", str(page), "--json"]) == 0
    assert seen == [(page, QUALITY, QUALITY)]
    assert page.parent.is_dir()


def test_without_json_figures_are_lines(monkeypatch, capsys):
    """A line a task, then one a figure."""
    monkeypatch.setattr("router_training.demo.evaluate.evaluate", lambda *args: QUALITY)
    assert main(["evaluate", str(bundle_path())]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["rev", "base", "0.25"],
        ["seed:", "7"],
        ["known_top1:", "0.75"],
    ]
