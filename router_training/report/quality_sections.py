"""The sections on answers, the router's space, time and size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from router_training.report import quality_figures as draw
from router_training.report.cells import dig, megabytes, number, share
from router_training.report.page import Section, Table
from router_training.report.style import OURS, as_image

Figures = Mapping[str, Any]


def quality_sections(figures: Figures, baselines: Figures) -> list[Section]:
    """In reading order; ``figures`` as ``evaluation.bundle.measure`` gives them."""
    quality = figures["quality"]
    out = [_by_adapter(quality["single"], figures["prompts"], figures["system_turn"])]
    if "pairs" in quality:
        out += [
            _pairs(quality["pairs"], figures["prompts"]),
            _mixtures(quality, baselines, figures["prompts"]),
        ]
    if "beside_wrong" in quality:
        out.append(_beside(quality["beside_wrong"]))
    return [*out, _map(figures["map"]), _latency(figures["latency"], baselines), _sizes(figures)]


def _by_adapter(single: Figures, prompts: int, system_turn: float) -> Section:
    columns = {
        "base": "base alone",
        "new_prompts": "right adapter, trained templates",
        "new_prompts_routed": "routed, trained templates",
        "new_templates": "right adapter, kept templates",
        "new_templates_routed": "routed, kept templates",
    }
    rows = [[name, *(share(row[c]) for c in columns)] for name, row in single["by_adapter"].items()]
    rows += [
        ["mean", *(share(single["means"][c]) for c in columns)],
        ["least", *(share(single["least"][c]) for c in columns)],
    ]
    return Section(
        "Are the answers right?",
        "Prompts for one adapter, answered greedily on the server's decoder: by the base alone, "
        "under the right adapter, and under what the router picks. Only the whole answer counts.",
        "The bar of 'routed' should stand on the mark of 'right adapter': what is missing is lost "
        "by routing. Routed over right: "
        f"{share(single['routed_over_oracle']['new_prompts'])} on new prompts in trained "
        f"templates, {share(single['routed_over_oracle']['new_templates'])} on kept templates.",
        as_image(draw.by_adapter(single["by_adapter"])),
        tables=[
            Table(
                ["", *columns.values()],
                rows,
                f"{prompts} prompts an adapter. Right adapter, kept templates, in a chat with a "
                f"system turn: {share(system_turn)} in the mean.",
                totals=2,
            )
        ],
    )


def _pairs(pairs: Figures, prompts: int) -> Section:
    oracle, routed = (pairs["kept_templates"][kind] for kind in ("oracle", "routed"))
    panel = {
        "the right two": oracle["by_pair"],
        "what the router picks": routed["by_pair"],
    }
    columns = {
        "right two, trained templates": pairs["trained_templates"]["oracle"],
        "routed, trained templates": pairs["trained_templates"]["routed"],
        "right two, kept templates": oracle,
        "routed, kept templates": routed,
    }
    rows = [
        [label, *(share(dig(c, path)) for c in columns.values())]
        for label, path in (
            ("trained together, mean", "trained.mean"),
            ("trained together, least pair", "trained.least"),
            ("never trained together, mean", "held_out.mean"),
            ("never trained together, least pair", "held_out.least"),
            ("all, mean", "mean"),
        )
    ]
    return Section(
        "Do pairs compose?",
        "Prompts that ask for an operation and a style, answered with both adapters at weight 1: "
        "the right two, and what the router picks. Kept templates; numbers are per cent of prompts "
        "whose whole answer is right.",
        "Framed pairs were never trained together. A cell darker on the right than on the left "
        "is lost by routing. Routed over right: "
        f"{share(pairs['trained_templates']['routed_over_oracle'])} on new prompts in trained "
        f"templates, {share(pairs['kept_templates']['routed_over_oracle'])} on kept templates.",
        as_image(draw.pairs(panel)),
        tables=[Table(["pairs", *columns], rows, f"{prompts} prompts a pair.")],
    )


def _mixtures(quality: Figures, baselines: Figures, prompts: int) -> Section:
    kept, other = quality["pairs"]["kept_templates"], quality["baselines"]
    bars = [
        ("the right two", *(kept["oracle"][k]["mean"] for k in ("trained", "held_out"))),
        (f"routed ({OURS})", *(kept["routed"][k]["mean"] for k in ("trained", "held_out"))),
    ]
    for name, value in baselines.items():
        if found := value.get("quality"):
            bars.append((name, found["pairs_trained"], found["pairs_held_out"]))
    bars = [(f"{label}, kept templates", *values) for label, *values in bars]
    labels = {
        "right_pair": "the right two",
        "best_single": "best single adapter",
        "uniform": "all adapters at 1/n",
        "uniform_full": "all adapters at 1",
        "random_pair": "random two",
        "base": "base alone",
    }
    bars += [
        (f"{label}, trained templates", other[k]["trained"], other[k]["held_out"])
        for k, label in labels.items()
    ]
    bars = [(label, *(_or_nan(v) for v in values)) for label, *values in bars]
    rows = [
        [label, *(share(None if math.isnan(v) else v) for v in values)] for label, *values in bars
    ]
    tables = [
        Table(
            ["prompts for a pair", "trained together", "never trained together"],
            rows,
            f"Kept templates: {prompts} prompts a pair{_settings(baselines)}. Trained templates: "
            f"{other['prompts_a_pair']} prompts a pair; of the best single adapter the highest "
            f"of any pair is {share(other['best_single_highest'])}.",
        )
    ]
    if three := quality.get("three_way"):
        tables.append(
            Table(
                ["three adapters at weight 1", "share right", "prompts"],
                [["operation, style, another style", share(three["mean"]), str(three["prompts"])]],
                "Three-way mixes: an operation, a style, 'then' another style around both. No "
                "training had three adapters at weight 1 in one row.",
            )
        )
    return Section(
        "Is the mixture worth it?",
        "What prompts for a pair get from the right two adapters, from what the router picks, "
        "from other routers, and from what needs no router: the best single adapter for each pair "
        "(chosen on these prompts, in its favour), all adapters, two at random.",
        "Longer is better. If one adapter alone did as well, there would be nothing to mix. "
        "What needs no router is on other prompts: compare it with the right two in trained "
        "templates.",
        as_image(draw.mixtures(bars)),
        tables=tables,
    )


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _settings(baselines: Figures) -> str:
    found = [
        f"{name} ({value['setting']}) on {value['prompts']}"
        for name, value in baselines.items()
        if "setting" in value
    ]
    return f", but {' and '.join(found)}" if found else ""


def _beside(beside: Figures) -> Section:
    rows = [
        [name, share(row["alone"]), share(row["beside"])]
        for name, row in beside["by_adapter"].items()
    ]
    rows.append(["mean", share(beside["alone"]), share(beside["beside"])])
    return Section(
        "A wrong adapter beside the right one",
        f"Prompts for one adapter, which runs at weight 1 with another at {beside['weight']} "
        "beside it; each of the others in turn.",
        "The shorter the line between the two marks, the less a wrong guess of the router costs; "
        "mind where the axis starts. "
        f"Of the exact match {share(beside['kept'])} is kept.",
        as_image(draw.beside_wrong(beside["by_adapter"], beside["weight"])),
        tables=[Table(["", "alone", f"beside a wrong one at {beside['weight']}"], rows, totals=1)],
    )


def _map(points: Figures) -> Section:
    return Section(
        "The router's space",
        "Stars are the adapters' keys, dots prompts in kept templates, each joined to the key of "
        "its adapter; crosses are prompts of no adapter. Many dimensions are laid out in two so "
        "that distances are kept as well as can be.",
        "A group of its own is an adapter that is easily told from the others. Two dimensions lose "
        f"much (stress {points['stress']:.2f}; 0 would be perfect): far apart here is far apart, "
        "but what is close here need not be close.",
        as_image(draw.key_map(points)),
    )


def _latency(rows: Any, baselines: Figures) -> Section:
    columns = {
        "features_ms": "features",
        "decision_ms": "whole decision",
        "decision_p99_ms": "99th percentile",
    }
    tables = [
        Table(
            ["registered adapters", *columns.values()],
            [[f"{row['adapters']:,}", *(number(row[c]) for c in columns)] for row in rows],
            "Milliseconds on one core, medians. Adapters beyond the bundle's have random keys.",
        )
    ]
    others = {n: v for n, v in baselines.items() if "milliseconds" in v}
    if others:
        tables.append(
            Table(
                ["milliseconds a prompt", "median"],
                [[name, number(value["milliseconds"])] for name, value in others.items()],
                f"The others, with the bundle's {rows[0]['adapters']:,} adapters.",
            )
        )
    return Section(
        "How long does a decision take?",
        "From a prompt's text to the chosen adapters, without the server around it.",
        "Both axes are logarithmic. The features depend on the prompt's length only, the rest of a "
        "decision on the number of adapters.",
        as_image(draw.latency(rows)),
        tables=tables,
    )


def _sizes(figures: Figures) -> Section:
    sizes = figures["sizes"]
    adapters = len(dig(figures, "quality.single.by_adapter"))
    names = {"base": "base, 4-bit", "adapters": f"{adapters} adapters", "router": "router's file"}
    rows = [[label, megabytes(sizes[key])] for key, label in names.items()]
    rows += [
        ["keys in memory", megabytes(sizes["keys"])],
        ["whole bundle", megabytes(sizes["whole"])],
    ]
    return Section(
        "What does it weigh?",
        "The bundle's parts on disk, and the adapters' keys as the router holds them.",
        tables=[Table(["", "MB"], rows, totals=1)],
    )
