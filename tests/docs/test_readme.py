"""The README states no unproved figure, and names the command that has to pass."""

from __future__ import annotations

import re

from tests.docs.pages import ROOT, commands

README = (ROOT / "README.md").read_text()


def test_no_figure_of_speed_size_or_quality_stands_in_the_readme() -> None:
    """Figures are claims, in benchmarks/claims.toml, where a command proves them."""
    figure = r"\b\d[\d.,]*\s?(?:%|ms|s|seconds|minutes|tokens/s|[kMG]B|x faster)(?!\w)"
    assert re.findall(figure, README) == []


def test_it_names_what_the_gate_runs() -> None:
    gate = [c for c in commands((ROOT / ".ci/run").read_text()) if c.startswith("make ")]
    assert gate
    assert [c for c in gate if c.partition(" TAG=")[0] not in README] == []
