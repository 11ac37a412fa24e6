"""The whole evaluation of a small bundle: measured once, written as a page and as a card."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import html
import io
import json
import re

import pytest

from mora_serve.router.features import Features, NGrams
from router_training.__main__ import main
from router_training.batched import AdapterRecipe
from router_training.demo.base import BaseRecipe
from router_training.demo.build import BuildOptions, build
from router_training.demo.evaluate import demo_subject
from router_training.demo.headlines import HEADLINES
from router_training.demo.manifest import Manifest
from router_training.demo.report import write_card, write_page
from router_training.demo.routing import RouterRecipe
from router_training.demo.suite import fitting_data
from router_training.report.cells import dig, share
from router_training.router import FitOptions
from tests.training.suites import among

NAMES = ("reverse", "uppercase", "roman", "json", "brackets")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("bundle") / "demo"
    options = BuildOptions(
        out,
        base=BaseRecipe(steps=2, rows=8),
        adapters=AdapterRecipe(steps=1, rows=8),
        router=RouterRecipe(24, FitOptions(Features(NGrams(dim=256)), dims=128)),
    )
    build(options, lambda line: None)
    return out


def of_some_tasks(bundle, seed, prompts):
    """The demo's subject and suite, the latter of five tasks only."""
    subject, suite = demo_subject(bundle, seed, prompts)
    fitting = fitting_data(NAMES, prompts=24)
    return subject, dataclasses.replace(among(suite, NAMES), fitting=fitting)


@pytest.fixture(scope="module")
def written(bundle, tmp_path_factory):
    """The page's text and the figures, as the command gives both."""
    file = tmp_path_factory.mktemp("report") / "report.html"
    out = io.StringIO()
    command = ["evaluate", str(bundle), "--prompts", "2", "--report", str(file), "--json"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr("router_training.demo.evaluate.demo_subject", of_some_tasks)
        assert main([*command, "--xlora-steps", "1"]) == 0
    return file.read_text(), json.loads(out.getvalue().splitlines()[-1])


def test_the_page_has_every_section_with_its_picture(written):
    """All pictures are SVG of their own, each with a text for who cannot see it."""
    page, _ = written
    images = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)" alt="([^"]+)"', page)
    assert len(images) == 13
    assert len({data for data, _ in images}) == 13
    for data, alt in images:
        assert base64.b64decode(data).startswith(b"<?xml")
        assert len(alt) > 20
    assert page.count("<h2") == 16
    assert page.count("</table>") >= 16
    assert "NaN" not in page
    assert "nan" not in re.sub(r"base64,[^\"]+|finance", "", page)


def test_the_page_states_the_figures(written):
    """Every headline figure stands in it as measured."""
    page, result = written
    for headline in HEADLINES:
        value = dig(result, headline.figure)
        assert value is not None, headline.figure
        row = rf"<td>{re.escape(html.escape(headline.label))}</td><td[^>]*>{share(value)}</td>"
        assert re.search(row, page), headline.label
    for name in ("centroids", "logistic regression", "MLP", "Arrow", "X-LoRA"):
        assert f"<th>{name}</th>" in page
    assert "cannot: a fixed set" in page


def test_the_figures_are_all_there(written):
    """Shares are shares, tables have every task and pair, the JSON is whole."""
    _, result = written
    assert set(result["tasks"]) == set(NAMES)
    shares = [v for v in result.values() if isinstance(v, float)]
    assert all(0 <= v <= 1 for v in [*shares, *result["router"].values()])
    quality = result["sections"]["quality"]
    assert len(quality["pairs"]["kept_templates"]["routed"]["by_pair"]) == 6
    assert set(result["baselines"]["X-LoRA"]["quality"]) == {
        "single",
        "pairs_trained",
        "pairs_held_out",
    }
    assert result["bytes"] == result["sections"]["sizes"]["whole"]


def test_a_page_without_baselines_is_a_page(written, tmp_path):
    """What was not measured is left out; the same figures give the same pictures."""
    _, result = written
    only = {k: v for k, v in result.items() if k not in ("baselines", "ours_on_few")}
    write_page(tmp_path / "a.html", only)
    write_page(tmp_path / "b.html", only)
    text = (tmp_path / "a.html").read_text()
    assert text == (tmp_path / "b.html").read_text()
    assert text.count("<h2") == 15
    assert "Arrow" not in re.sub(r"base64,[^\"]+", "", text).replace("Centroids, Arrow and", "")


def test_the_card_states_the_figures(written, bundle):
    """Tasks, pairs and router, as measured."""
    _, result = written
    manifest = Manifest.read(bundle)
    measured = tuple(a for a in manifest.adapters if a.name in NAMES)
    write_card(bundle, dataclasses.replace(manifest, adapters=measured), result)
    card = (bundle / "CARD.md").read_text()
    for name, row in result["tasks"].items():
        assert re.search(rf"\| {name} \| .* \| {row['new_prompts']:.2f} \|", card), name
    assert "{" not in card.replace("{x}", "")
