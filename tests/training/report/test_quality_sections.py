"""The sections on answers: every figure beside its own label."""

from __future__ import annotations

import pytest

from router_training.report.cells import share
from router_training.report.quality_sections import quality_sections
from router_training.report.style import OURS, drawing


@pytest.fixture
def sections(result):
    with drawing():
        found = quality_sections(result["sections"], result["baselines"])
    return {section.title: section for section in found}


def _rows(table):
    return {label: cells for label, *cells in table.rows}


def test_every_adapter_has_its_own_row(sections, result):
    """Then the means and the least."""
    single = result["sections"]["quality"]["single"]
    order = ("base", "new_prompts", "new_prompts_routed", "new_templates", "new_templates_routed")
    rows = _rows(sections["Are the answers right?"].tables[0])
    wanted = {**single["by_adapter"], "mean": single["means"], "least": single["least"]}
    assert rows == {name: [share(row[kind]) for kind in order] for name, row in wanted.items()}


def test_pairs_have_their_own_rows(sections, result):
    """Right two and routed, in trained and in kept templates."""
    pairs = result["sections"]["quality"]["pairs"]
    columns = [
        pairs[f"{templates}_templates"][kind]
        for templates in ("trained", "kept")
        for kind in ("oracle", "routed")
    ]
    rows = _rows(sections["Do pairs compose?"].tables[0])
    for part, label in (("trained", "trained together"), ("held_out", "never trained together")):
        assert rows[f"{label}, mean"] == [share(c[part]["mean"]) for c in columns]
        assert rows[f"{label}, least pair"] == [share(c[part]["least"]) for c in columns]
    assert rows["all, mean"] == [share(c["mean"]) for c in columns]


def test_what_needs_no_router_stands_beside_the_right_two_on_its_prompts(sections, result):
    """Every label says in which templates its prompts are, the caption how many there are."""
    quality = result["sections"]["quality"]
    kept, other = quality["pairs"]["kept_templates"], quality["baselines"]
    peft = {name: result["baselines"][name]["quality"] for name in ("Arrow", "X-LoRA")}
    means = {
        "the right two": kept["oracle"],
        f"routed ({OURS})": kept["routed"],
    }
    wanted = {
        **{
            label: [row[k]["mean"] for k in ("trained", "held_out")] for label, row in means.items()
        },
        **{
            name: [row[f"pairs_{k}"] for k in ("trained", "held_out")] for name, row in peft.items()
        },
    }
    wanted = {f"{label}, kept templates": values for label, values in wanted.items()}
    for label, name in {
        "the right two": "right_pair",
        "best single adapter": "best_single",
        "all adapters at 1/n": "uniform",
        "all adapters at 1": "uniform_full",
        "random two": "random_pair",
        "base alone": "base",
    }.items():
        wanted[f"{label}, trained templates"] = [other[name][k] for k in ("trained", "held_out")]
    table, three = sections["Is the mixture worth it?"].tables
    assert _rows(table) == {label: [share(v) for v in values] for label, values in wanted.items()}
    assert table.caption.startswith(
        "Kept templates: 48 prompts a pair, but Arrow (top 3) on 12 and X-LoRA (9 steps) on 12. "
        "Trained templates: 8 prompts a pair;"
    )
    assert three.rows[0][1:] == [share(quality["three_way"]["mean"]), "96"]


def test_a_wrong_adapter_beside_the_right_one_has_its_own_column(sections, result):
    """By adapter, and in the mean."""
    beside = result["sections"]["quality"]["beside_wrong"]
    (table,) = sections["A wrong adapter beside the right one"].tables
    wanted = {**beside["by_adapter"], "mean": beside}
    assert _rows(table) == {n: [share(r["alone"]), share(r["beside"])] for n, r in wanted.items()}
