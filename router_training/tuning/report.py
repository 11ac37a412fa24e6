"""A run's report.html: losses, figures before and after, importance by layer, answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from router_training.report.page import Section, Table, page
from router_training.report.style import COLOURS, INK, MUTED, OURS, as_image, drawing, panels
from router_training.tuning.answers import Answered
from router_training.tuning.drop import Decision
from router_training.tuning.recorder import METRICS_FILE
from router_training.tuning.results import MANIFEST_FILE

REPORT_FILE = "report.html"
SHOWN = 24  # answers side by side
LONGEST = 400  # characters of a text


class Outcome(Protocol):
    """What the report is of; see ``whole.Outcome``."""

    @property
    def name(self) -> str:
        """The adapter's."""

    @property
    def directory(self) -> Path:
        """Where it is."""

    @property
    def before(self) -> Mapping[str, float]:
        """Figures of the base alone."""

    @property
    def after(self) -> Mapping[str, float]:
        """Of the adapter."""

    @property
    def answered(self) -> Sequence[Answered]:
        """Held-out rows with both answers."""

    @property
    def passed(self) -> bool | None:
        """The quality check; None where nothing was measured."""


def write_report(outcome: Outcome, run: Path) -> Path:
    """Write the page beside the adapter's weights; ``run`` is the run's directory."""
    manifest = json.loads((outcome.directory / MANIFEST_FILE).read_text())
    sections = [_losses(run), _figures(outcome)]
    decision = Decision.read(run)
    if decision is not None:
        sections.append(_importance(decision))
    if outcome.answered:
        sections.append(_answers(outcome.answered))
    sections.append(_made_of(manifest))
    lead = [
        f"{manifest['settings']['adapter']} on {manifest['settings']['base_model']}: "
        f"{manifest['steps']} steps over {manifest['rows']['train']} rows, "
        f"{manifest['trained_parameters']:,} parameters.",
        {
            True: "The quality check passed.",
            False: "The quality check REFUSED it.",
            None: "There was nothing to check its quality on.",
        }[outcome.passed],
    ]
    versions = ", ".join(f"{name} {number}" for name, number in manifest["versions"].items())
    file = outcome.directory / REPORT_FILE
    file.write_text(page(f"Adapter {outcome.name}", lead, sections, f"Made with {versions}."))
    return file


def _losses(run: Path) -> Section:
    lines = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    with drawing():
        figure, (axes,) = panels(7, 3.2)
        for name, colour, label, style in (
            ("loss", COLOURS[OURS], "learned rows", "-"),
            ("eval_loss", INK, "held-out rows", "--"),
        ):
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                mark = "o" if name == "eval_loss" else None
                axes.plot(*zip(*points, strict=True), style, color=colour, label=label, marker=mark)
        axes.set_xlabel("step")
        axes.set_ylabel("loss a learned token")
        losses = [line[key] for line in lines for key in ("loss", "eval_loss") if key in line]
        if losses and 0 < 100 * min(losses) < max(losses):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.legend()
        image = as_image(figure)
    return Section(
        "Loss", "The loss of what was learned and of what was held out, by step.", image=image
    )


def _figures(outcome: Outcome) -> Section:
    rows = [
        (name, f"{outcome.before[name]:.4f}", f"{outcome.after[name]:.4f}")
        for name in outcome.before
    ]
    return Section(
        "Before and after",
        "The base alone, and with the adapter, on held-out rows: losses as trained, the others of "
        "greedy answers of the server.",
        "A loss is better when lower, all others when higher.",
        tables=[Table(("figure", "base", "adapter"), rows)],
    )


def _importance(decision: Decision) -> Section:
    names = list(decision.importance)
    layers = max(map(len, decision.importance.values()))
    with drawing():
        figure, (axes,) = panels(7, 0.5 + 0.35 * len(names))
        for y, name in enumerate(names):
            for layer, value in enumerate(decision.importance[name]):
                kept = layer in decision.kept[name]
                size = 20 + 900 * value
                colour = COLOURS[OURS] if kept else MUTED
                mark = "o" if kept else "x"
                axes.scatter(layer, y, s=size, color=colour, marker=mark, clip_on=False)
        axes.set_yticks(range(len(names)), names)
        axes.set_xticks(range(layers))
        axes.set_xlabel("layer")
        axes.set_ylim(len(names) - 0.3, -0.7)
        image = as_image(figure)
    does = "share one adapter" if decision.mode == "share" else "have none"
    rows = [(name, *(f"{v:.2f}" for v in values)) for name, values in decision.importance.items()]
    return Section(
        "LoRA-Drop",
        f"How much each layer's adapter added, as a part of its projection's: the layers that "
        f"hold {decision.threshold:.0%} of it kept their own; the others, crosses, {does}.",
        image=image,
        tables=[Table(("projection", *map(str, range(layers))), rows)],
    )


def _answers(answered: Sequence[Answered]) -> Section:
    rows = [
        tuple(_cut(text) for text in (a.prompt, a.wanted, a.base, a.adapted))
        for a in answered[:SHOWN]
    ]
    short = frozenset(
        (i, 3) for i, a in enumerate(answered[:SHOWN]) if a.adapted.strip() != a.wanted.strip()
    )
    return Section(
        "Answers",
        f"The first {len(rows)} of {len(answered)} held-out rows.",
        "An answer of the adapter that is not the right one to the letter stands out.",
        tables=[Table(("prompt", "right", "base", "adapter"), rows, text=(1, 2, 3), short=short)],
    )


def _made_of(manifest: Mapping[str, Any]) -> Section:
    rows = [(key, json.dumps(value)) for key, value in manifest["settings"].items()]
    rows += [("base", manifest["base_fingerprint"]), ("rows", manifest["data_digest"])]
    return Section(
        "Made of",
        "Every setting, and digests of the base and of the rows.",
        tables=[Table(("key", "value"), rows, text=(1,))],
    )


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
