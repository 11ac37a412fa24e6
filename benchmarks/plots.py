"""Pictures of the benchmarks' parts, each from the JSON that the part printed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.turns import OURS
from router_training.report.style import COLOURS, MUTED, panels

Result = Mapping[str, Any]

KINDS = {
    "none": "no adapter",
    "one": "one adapter for all",
    "distinct": "all distinct",
    "mixtures": "two-adapter mixtures",
}
_PALETTE = list(COLOURS.values())
SYSTEMS = {
    OURS: (_PALETTE[0], "o"),
    "transformers generate": (_PALETTE[1], "s"),
    "transformers continuous batching": (_PALETTE[2], "^"),
    "PEFT mixed batch": (_PALETTE[3], "D"),
    "PEFT one adapter set": (_PALETTE[4], "v"),
    "PEFT one after another": (_PALETTE[5], "P"),
}
# phases of a step (see model/native/library.py) as they are drawn
STEP_PARTS: Mapping[str, tuple[str, ...]] = {
    "4-bit products, A x": ("qkv product", "o product", "gate_up product", "down product"),
    "head": ("head product", "judgement"),
    "attention": ("attention",),
    "B, norms, activation": ("embedding", "heads", "o rows", "swiglu", "down rows"),
    "scheduling, sampling": ("engine",),
}
DOTS_PER_INCH = 80


def throughput(result: Result) -> Any:
    """Tokens a second and first tokens against parallel requests; a column a kind of mixtures."""
    rows = [r for r in result["rows"] if "failure" not in r]
    kinds = [kind for kind in KINDS if any(r["adapters"] == kind for r in rows)]
    figure, columns = _grid(len(kinds), "row")
    for column, kind in zip(columns, kinds, strict=True):
        of_kind = [r for r in rows if r["adapters"] == kind]
        _column(column, of_kind, "requests", "parallel requests")
        column[0].set_title(KINDS[kind])
        for axis in column:
            axis.set_yscale("log")
    _legend(figure, columns)
    return figure


def growth(result: Result) -> Any:
    """Tokens a second and first tokens against what grows; a column a sweep."""
    sweeps = {
        name: [r for r in rows if "failure" not in r] for name, rows in result["sweeps"].items()
    }
    titles = {
        "active": "active adapters",
        "rank": "rank",
        "prompt": "tokens of the prompt",
        "mixture": "adapters of each request",
    }
    figure, columns = _grid(len(sweeps), "none")
    for column, (name, rows) in zip(columns, sweeps.items(), strict=True):
        _column(column, [r for r in rows if r.get("adapters") != "distinct"], name, titles[name])
        distinct = [r for r in rows if r.get("adapters") == "distinct"]
        for axis, value in zip(column, (_rate, _first), strict=True):
            if distinct:
                colour, mark = SYSTEMS[OURS]
                at, y = [r[name] for r in distinct], [value(r) for r in distinct]
                label = f"{OURS}, distinct adapters"
                axis.plot(at, y, mark, ls="--", color=colour, mfc="white", ms=5, label=label)
            axis.set_ylim(bottom=0)
    _legend(figure, columns)
    return figure


def overhead(result: Result) -> Any:
    """Throughput in-process and streamed, and memory by part."""
    figure, axes = panels(8, 3.0, 2)
    streaming, memory = result.get("streaming", {}), result.get("memory", {}).get("bytes", {})
    kinds = [kind for kind in KINDS if kind in streaming]
    for shift, (way, colour) in enumerate(
        (("in_process", MUTED), ("streamed", SYSTEMS[OURS][0])),
    ):
        at = [i + 0.38 * (shift - 0.5) for i in range(len(kinds))]
        heights = [streaming[kind][way] for kind in kinds]
        axes[0].bar(at, heights, 0.36, color=colour, label=way.replace("_", "-"))
    axes[0].set_xticks(range(len(kinds)), [KINDS[kind] for kind in kinds])
    axes[0].set_ylabel("tokens a second")
    axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    axes[1].barh(list(memory), [size / 1e6 for size in memory.values()], color=SYSTEMS[OURS][0])
    axes[1].invert_yaxis()
    axes[1].set_xlabel("memory in MB")
    return figure


def step(result: Result) -> Any:
    """A bar a case, made of the step's phases, with its two floors marked."""
    rows = result["rows"]
    figure, (axis,) = panels(8, 0.5 * len(rows) + 1.6)
    at = range(len(rows))
    left = [0.0] * len(rows)
    for i, (name, phases) in enumerate(STEP_PARTS.items()):
        parts = [1e3 * sum(r["phase_seconds"][p] for p in phases) for r in rows]
        axis.barh(at, parts, 0.6, left=left, label=name, color=_PALETTE[i % len(_PALETTE)])
        left = [a + b for a, b in zip(left, parts, strict=True)]
    floors = (("products", "4-bit products alone", "black"), ("bytes", "bytes, copied", "red"))
    for key, label, colour in floors:
        values = [1e3 * r[f"{key}_seconds"] for r in rows]
        low, high = ([i + shift for i in at] for shift in (-0.4, 0.4))
        axis.vlines(values, low, high, color=colour, lw=2, label=label)
    axis.set_yticks(at, [f"{KINDS[r['adapters']]}, {r['requests']}" for r in rows])
    axis.invert_yaxis()
    pace = rows[0]["copy_bytes_per_second"] / 1e9
    axis.set_xlabel(f"milliseconds a step (bytes at {pace:.1f} GB/s, the pace of a copy)")
    figure.legend(loc="outside upper center", ncols=4)
    return figure


def registered(result: Result) -> Any:
    """Throughput and loads a request against the number of registered adapters."""
    figure, axes = panels(8, 3.0, 2)
    values = (("tokens_per_second", "tokens a second"), ("misses_per_request", "loads a request"))
    for i, kind in enumerate(dict.fromkeys(r["popularity"] for r in result["saturated"])):
        rows = [r for r in result["saturated"] if r["popularity"] == kind]
        counts = [r["adapters"] for r in rows]
        for axis, (key, label) in zip(axes, values, strict=True):
            axis.plot(counts, [r[key] for r in rows], "o-", color=_PALETTE[i], label=kind)
            axis.set(xscale="log", xlabel="registered adapters", ylabel=label)
            axis.set_xticks(counts, [str(n) for n in counts])
            axis.minorticks_off()
    for axis in axes:
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])  # once all is drawn
    axes[1].legend()
    return figure


def residency(result: Result) -> Any:
    """Percentiles of the times between messages, with and without new adapters."""
    figure, (axis,) = panels(6, 3.4)
    rest = [100 - p for p in result["percentiles"]]
    labels = {"quiet": "streams alone", "busy": "new adapters beside them"}
    for i, (kind, label) in enumerate(labels.items()):
        axis.plot(rest, result["curve_ms"][kind], color=_PALETTE[i], label=label)
    axis.set(xscale="log", ylim=(0, None), xlabel="percentile", ylabel="ms between messages")
    axis.set_xticks([50, 10, 1, 0.1], ["50", "90", "99", "99.9"])
    axis.minorticks_off()
    axis.invert_xaxis()
    axis.legend()
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a small PNG: few colours suffice."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DOTS_PER_INCH, metadata={"Software": None})
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)


def _grid(columns: int, share: Literal["none", "row"]) -> tuple[Any, list[tuple[Any, Any]]]:
    """A figure of two rows, and its axes by column: tokens a second above the first token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.7 * columns, 5.4), layout="constrained")
    top, bottom = figure.subplots(2, columns, squeeze=False, sharey=share, sharex="col")
    top[0].set_ylabel("tokens a second")
    bottom[0].set_ylabel("first token, ms")
    return figure, list(zip(top, bottom, strict=True))


def _rate(r: Result) -> float:
    return float(r["tokens_per_second"])


def _first(r: Result) -> float:
    return float(r["first_token_ms"]["p50"])


def _column(column: tuple[Any, Any], rows: Sequence[Result], x: str, label: str) -> None:
    """A line a system in both axes, with the range of the rates of its repetitions."""
    rates, firsts = column
    for name, (colour, mark) in SYSTEMS.items():
        own = [r for r in rows if r["system"] == name]
        if not own:
            continue
        at = [r[x] for r in own]
        low = [_rate(r) - r["least"] for r in own]
        high = [r["most"] - _rate(r) for r in own]
        style = {"color": colour, "ms": 5, "label": name}
        rates.errorbar(at, [_rate(r) for r in own], [low, high], fmt=mark, ls="-", **style)
        firsts.plot(at, [_first(r) for r in own], mark, ls="-", **style)
    values = sorted({r[x] for r in rows})
    if values and values[-1] >= 16 * values[0]:
        rates.set_xscale("log", base=2)
    firsts.set_xticks(values, [str(v) for v in values])
    firsts.minorticks_off()
    firsts.set_xlabel(label)


def _legend(figure: Any, columns: Sequence[tuple[Any, Any]]) -> None:
    """One legend below all panels."""
    found: dict[str, Any] = {}
    for axis, _ in columns:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=3)
