"""How every picture looks: colours that the colour-blind can tell apart, plain axes, SVG."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

OURS = "mora-serve"
INK, MUTED, PALE = "#222222", "#767676", "#d9d9d9"

# Okabe and Ito's palette; a method has one colour and one mark in all pictures.
COLOURS: Mapping[str, str] = MappingProxyType(
    {
        OURS: "#0072B2",
        "centroids": "#E69F00",
        "logistic regression": "#009E73",
        "MLP": "#D55E00",
        "Arrow": "#CC79A7",
        "X-LoRA": "#56B4E9",
    }
)
MARKS: Mapping[str, str] = MappingProxyType(
    {
        OURS: "o",
        "centroids": "s",
        "logistic regression": "^",
        "MLP": "D",
        "Arrow": "v",
        "X-LoRA": "P",
    }
)
_SETTINGS = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ececec",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "path",  # the page looks the same whatever fonts a reader has
    "svg.hashsalt": "mora-serve",
}


@contextmanager
def drawing() -> Iterator[None]:
    """The settings of all pictures, for as long as one is drawn and written."""
    import matplotlib as mpl

    with mpl.rc_context(_SETTINGS):
        yield


def panels(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Any, list[Any]]:
    """A figure of so many inches and its axes, left to right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **options)
    return figure, list(axes[0])


def as_image(figure: Any) -> str:
    """A data URI of the figure as SVG: the same figure gives the same bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def share_limits(values: Iterable[float]) -> tuple[float, float]:
    """Limits of an axis of shares: from 0, or from tenths above 0.5 where all are high, to 1.

    With room for a mark at either end.
    """
    least = min(values, default=0.0)
    low = 0.0 if least < 0.55 else int(least * 10 - 0.5) / 10
    room = 0.03 * (1 - low)
    return low - room, 1 + room
