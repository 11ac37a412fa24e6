"""Pictures of routing print the figures that they draw."""

from __future__ import annotations

import pytest

from router_training.report.routing_figures import wordings
from router_training.report.style import OURS, drawing


@pytest.mark.parametrize(
    ("value", "label"),
    [(1.0, "1.00"), (0.996, "1.00"), (0.994, ".99"), (0.5, ".50"), (0.004, ".00"), (0.0, ".00")],
)
def test_bars_are_labelled_with_their_height(value, label):
    """Rounded to two places; a bar of the full height says 1.00."""
    with drawing():
        figure = wordings({OURS: [value, 0.25], "MLP": [0.75, value]}, ["kept", "new"])
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.texts] == [label, ".25", ".75", label]
    heights = [bar.get_height() for bars in axis.containers for bar in bars]
    assert heights == [value, 0.25, 0.75, value]
