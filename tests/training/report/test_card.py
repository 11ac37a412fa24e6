"""CARD.md states every figure where its words are."""

from __future__ import annotations

import pytest

from router_training.demo.manifest import BundledAdapter, Manifest
from router_training.demo.report import write_card


@pytest.fixture
def card(result, tmp_path):
    adapters = (
        BundledAdapter("reverse", "adapters/reverse", ("reverse",), "", True, "known"),
        BundledAdapter("json", "adapters/json", ("json",), "style", True, "held-out"),
    )
    write_card(tmp_path, Manifest("base", "router", "f", 5, adapters), result)
    return (tmp_path / "CARD.md").read_text()


def test_every_task_has_its_own_row(card, result):
    """New prompts, new paraphrases, the base alone, and whether the router was fitted on it."""
    for name, fitting in (("reverse", "known"), ("json", "held-out")):
        row = result["sections"]["quality"]["single"]["by_adapter"][name]
        (line,) = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        figures = [f"{row[kind]:.2f}" for kind in ("new_prompts", "new_templates", "base")]
        assert cells[2:] == [*figures, fitting]
    means = result["sections"]["quality"]["single"]["means"]
    figures = [f"**{means[k]:.3f}**" for k in ("new_prompts", "new_templates", "base")]
    assert f"| **mean** | | {' | '.join(figures)} | |" in card


def test_pairs_have_their_own_rows(card, result):
    """And what needs no router stands beside the right two on the same few prompts."""
    quality = result["sections"]["quality"]
    new, kept = (quality["pairs"][f"{kind}_templates"]["oracle"] for kind in ("trained", "kept"))
    for label, part in (("trained together", "trained"), ("never trained together", "held_out")):
        mean, least = new[part]["mean"], new[part]["least"]
        row = f"| {label} | **{mean:.3f}** | {least:.3f} | {kept[part]['mean']:.3f} |"
        assert row in card.splitlines()
    others = quality["baselines"]
    uniform = max(others["uniform"]["mean"], others["uniform_full"]["mean"])
    text = " ".join(card.split())
    assert (
        f"On 8 of the new prompts a pair the right two answer {others['right_pair']['mean']:.3f}, "
        f"the best single adapter for each pair {others['best_single']['mean']:.3f}, all adapters "
        f"{uniform:.3f}, two at random {others['random_pair']['mean']:.3f}. Three adapters at "
        f"weight 1 at once, which no training had: {quality['three_way']['mean']:.3f}."
    ) in text


def test_the_router_has_its_own_rows(card, result):
    """On new prompts and on new paraphrases, in this order; later adapters by their examples."""
    routing, quality = (result["sections"][k] for k in ("routing", "quality"))
    new, later = routing["trained_templates"], result["sections"]["later"]["by_count"]
    single, pairs = quality["single"]["routed_over_oracle"], quality["pairs"]
    rows = {
        "a known task's adapter scores best": (new["known_top1"], routing["known_top1"]),
        "it runs, and nothing else": (new["known_alone"], routing["known_alone"]),
        "both adapters of a pair run, and nothing else": (
            new["pairs"]["exactly"],
            routing["pairs"]["exactly"],
        ),
        "right answers, routed over right adapter: tasks": (
            single["new_prompts"],
            single["new_templates"],
        ),
        "the same: pairs": tuple(
            pairs[f"{kind}_templates"]["routed_over_oracle"] for kind in ("trained", "kept")
        ),
    }
    for label, values in rows.items():
        (line,) = [line for line in card.splitlines() if line.startswith(f"| {label} |")]
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        assert cells == [label, *(f"{value:.3f}" for value in values)]
    text = " ".join(card.replace("*", "").split())
    roc = routing["roc"]
    for words in (
        f"with 16 example prompts scores best for {later['16']['mean']:.3f} of its new paraphrases "
        f"(8 prompts: {later['8']['mean']:.3f}, 4: {later['4']['mean']:.3f};",
        f"right adapter in {routing['reworded']['top'][0]:.3f} of cases, others in "
        f"{routing['new_words']['top'][0]:.3f}.",
        f"new paraphrases {routing['abstained']:.3f} get the base",
        f"adapter in {roc['far']['accepted']:.3f} of cases, such as are worded like a task in "
        f"{roc['near']['accepted']:.3f};",
        f"an AUROC of {roc['far']['auroc']:.3f} and {roc['near']['auroc']:.3f}.",
        f"probabilities is {result['sections']['calibration']['error']:.3f}.",
        f"after a system turn: {result['sections']['system_turn']:.3f}",
        f"the right one keeps {quality['beside_wrong']['kept']:.3f}",
        "shares of 48 prompts a task or pair",
        "(seed 1000003, not used in fitting;",
        "Size: 6.6 MB.",
    ):
        assert words in text
    assert "{" not in card.replace("{x}", "")
