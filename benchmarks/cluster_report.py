"""The simulator's tables and picture: the grid, and its predictions beside the real runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.tables import markdown
from mora_serve.cluster.policy import ROUTINGS
from router_training.report.style import COLOURS

Result = Mapping[str, Any]

MARKS = dict(zip(ROUTINGS, ("o", "s", "^"), strict=True))
PANELS = (
    ("hit_rate", "adapter hit rate"),
    ("first_token_p50_ms", "first token, p50 in ms"),
    ("first_token_p95_ms", "first token, p95 in ms"),
    ("busy_seconds_per_1000", "replica-seconds at work\na 1,000 answers"),
)


def tables(result: Result) -> str:
    """Every point of the grid; every prediction beside what was measured."""
    parts = []
    if result["grid"]:
        headers = (
            *("routing", "replicas", "adapters", "hit rate", "first token, ms", "p95"),
            *("replica-s / 1,000", "most loaded / mean", "refused"),
        )
        parts.append(markdown(headers, [_cells(row) for row in result["grid"]]))
    if result["checks"]:
        names = ("routing", "servers", "figure", "foretold", "measured", "error")
        lines = [
            (
                *(check["routing"], str(check["servers"]), key.replace("_", " ")),
                *(f"{check['foretold'][key]:.3g}", f"{check['measured'][key]:.3g}"),
                f"{error:.1%}",
            )
            for check in result["checks"]
            for key, error in check["errors"].items()
        ]
        parts.append(markdown(names, lines))
    return "\n\n".join(parts)


def _cells(row: Result) -> Sequence[str]:
    return (
        *(row["routing"], f"{row['replicas']:,}", f"{row['adapters']:,}"),
        *(f"{row['hit_rate']:.3f}", f"{row['first_token_p50_ms']:.1f}"),
        *(f"{row['first_token_p95_ms']:.1f}", f"{row['busy_seconds_per_1000']:.2f}"),
        *(f"{row['load']:.2f}", str(row["refused"])),
    )


def picture(result: Result) -> Any:
    """A row a figure of merit, a column a number of adapters, against the replicas."""
    from matplotlib.figure import Figure

    grid = result["grid"]
    adapters = sorted({row["adapters"] for row in grid})
    figure = Figure(figsize=(2.5 * len(adapters) + 0.5, 9.0), layout="constrained")
    axes = figure.subplots(len(PANELS), len(adapters), squeeze=False, sharex=True, sharey="row")
    colours = dict(zip(ROUTINGS, COLOURS.values(), strict=False))
    for (key, label), line in zip(PANELS, axes, strict=True):
        line[0].set_ylabel(label)
        for count, axis in zip(adapters, line, strict=True):
            for routing in ROUTINGS:
                own = sorted(
                    (r["replicas"], r[key])
                    for r in grid
                    if (r["routing"], r["adapters"]) == (routing, count)
                )
                if own:
                    at, values = zip(*own, strict=True)
                    style = {"color": colours[routing], "ms": 4, "label": routing}
                    axis.plot(at, values, MARKS[routing], ls="-", **style)
            axis.set_xscale("log")
            replicas = sorted({row["replicas"] for row in grid})
            axis.set_xticks(replicas, [f"{n:,}" for n in replicas])
            axis.minorticks_off()
            axis.set_ylim(0, 1.08 * max(row[key] for row in grid))
    for count, top, bottom in zip(adapters, axes[0], axes[-1], strict=True):
        top.set_title(f"{count:,} adapters")
        bottom.set_xlabel("replicas")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(ROUTINGS))
    return figure
