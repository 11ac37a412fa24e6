"""The first tables: every figure beside its own label."""

from __future__ import annotations

import pytest

from router_training.demo.headlines import HEADLINES
from router_training.report.cells import dig, share
from router_training.report.overview import Headline, comparison, overview
from router_training.report.style import OURS


def test_a_figure_below_its_goal_is_marked():
    """And told in words; one without a goal is not judged."""
    headlines = [
        Headline("high", "a", ">=", 0.9),
        Headline("low", "b", "<=", 0.1, {"beside": "c"}),
        Headline("free", "c"),
        Headline("absent", "d", ">=", 1.0),
    ]
    section = overview({"a": 0.5, "b": 0.05, "c": 0.3}, headlines)
    (table,) = section.tables
    assert table.short == {(0, 1)}
    assert [row[0] for row in table.rows] == ["high", "low", "free"]
    assert table.rows[1][3] == "beside 0.300"
    assert section.read.startswith("1 of")


def test_every_headline_has_its_own_figure_and_baselines(result):
    """Each in the row of its label."""
    (table,) = overview(result, HEADLINES).tables
    assert [row[0] for row in table.rows] == [headline.label for headline in HEADLINES]
    for row, headline in zip(table.rows, HEADLINES, strict=True):
        assert row[1] == share(dig(result, headline.figure))
        beside = [f"{n} {share(dig(result, path))}" for n, path in headline.baselines.items()]
        assert row[3] == (", ".join(beside) or "–")


@pytest.fixture
def rows(result):
    """The methods' table by label, each row by method."""
    (table,) = comparison(result, result["baselines"]).tables
    return {label: dict(zip(table.head[1:], cells, strict=True)) for label, *cells in table.rows}


def test_every_method_has_its_own_figures(rows, result):
    """Routing of all; answers of those that give any."""
    for name, method in {OURS: result["sections"], **result["baselines"]}.items():
        routing = method["routing"]
        assert rows["known adapters, top 1"][name] == share(routing["known_top1"])
        assert rows["new sentences, top 1"][name] == share(routing["reworded"]["top"][0])
        assert rows["both of a pair on top"][name] == share(routing["pairs"]["both_on_top"])
        for kind in ("far", "near"):
            assert rows[f"{kind} prompts, AUROC"][name] == share(routing["roc"][kind]["auroc"])
        later = rows["adapters registered later (16 examples), top 1"][name]
        if "later" in method:
            assert later == share(method["later"]["top1"])
    assert later.startswith("cannot")
    answers = {name: result["baselines"][name]["quality"] for name in ("Arrow", "X-LoRA")}
    answers[OURS] = result["ours_on_few"]["routed"]
    for label, kind in (
        ("one adapter", "single"),
        ("pairs trained together", "pairs_trained"),
        ("pairs never trained together", "pairs_held_out"),
    ):
        for name, found in answers.items():
            assert rows[f"answers right: {label}"][name] == share(found[kind])


def test_costs_are_those_of_one_fitting_and_of_one_newcomer(rows):
    """With the number of adapters that each method was fitted on."""
    assert list(rows["adapters fitted on"].values()) == ["1", "15", "15", "15", "none", "15"]
    assert list(rows["seconds to fit"].values()) == ["7.25", "0.5", "3.25", "9.75", "–", "80"]
    assert list(rows["to take in one adapter"].values()) == [
        "1.75 ms",
        "2.5 ms",
        "3.25 s, trained anew",
        "9.75 s, trained anew",
        "a singular vector a linear",
        "trained anew",
    ]
    assert list(rows["to route a prompt"].values()) == [
        "0.42 ms",
        "3 ms",
        "4 ms",
        "5 ms",
        "3.0x a plain pass",
        "2.0x a plain pass",
    ]
