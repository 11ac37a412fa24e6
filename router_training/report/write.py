"""report.html from a result: the one place where measuring, drawing and the page meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from router_training.report.overview import Headline, comparison, overview
from router_training.report.page import page
from router_training.report.quality_sections import quality_sections
from router_training.report.routing_sections import routing_sections
from router_training.report.style import drawing


def write_report(
    file: Path,
    title: str,
    result: Mapping[str, Any],
    headlines: Sequence[Headline],
    made: str,
) -> None:
    """Write one HTML file with everything in it.

    ``result`` has the summary's figures, ``sections`` as ``evaluation.bundle.measure`` gives them,
    and, where other routers were measured, ``baselines`` by name. ``made`` says how and where.
    """
    figures, baselines = result["sections"], result.get("baselines", {})
    with drawing():
        sections = [overview(result, headlines)]
        if baselines:
            sections.append(comparison(result, baselines))
        sections += routing_sections(figures, baselines)
        sections += quality_sections(figures, baselines)
    lead = [
        f"{figures['prompts']} prompts a task, pair and kind of template, drawn with seed "
        f"{figures['seed']}, which no training or fitting draws from; "
        f"{len(figures['quality']['single']['by_adapter'])} adapters, of which the router was "
        f"fitted on {len(figures['known'])}. Answers are generated greedily and count only whole.",
        "Kept templates are wordings that were split off before any training; near-domain prompts "
        "ask for things that no adapter does, in the wording of those that some adapter does.",
    ]
    file.write_text(page(title, lead, sections, made))
