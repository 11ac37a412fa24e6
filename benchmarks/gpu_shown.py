"""The table and the picture of the measurement on a card, from the JSON that it printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.plots import KINDS
from benchmarks.tables import markdown
from router_training.report.style import COLOURS, MUTED, OURS, panels

Result = Mapping[str, Any]
ABOUT = ("kernels_used", "early_launches", "not_captured", "ready_seconds", "memory", "missing")
BYTES = ("4-bit weights", "head", "adapters", "keys and values")


def table(result: Result) -> str:
    """A table a part; a part that failed says why."""
    shown: tuple[tuple[str, Callable[[Any], str]], ...] = (
        *(("card", _card), ("steps", _steps), ("first", _first), ("loads", _pairs)),
        *(("peft", _pairs), ("products", _products), ("kernels", _kernels)),
        *(("groups", _groups), ("demo", _pairs), ("tests", _pairs)),
    )
    found = []
    for name, form in shown:
        part = result.get(name)
        if isinstance(part, Mapping) and "error" in part:
            found.append(f"**{name}**: {part['error']}")
        elif part:
            found.append(f"**{name}**\n\n{form(part)}")
    about = {name: result[name] for name in ABOUT if name in result}
    if about:
        found.append(f"**engine**\n\n{_pairs(about)}")
    if products := result.get("four_bit_products"):
        found.append(
            f"**4-bit products of the base: the way that was taken**\n\n{_taken(products)}"
        )
    if figures := result.get("figures"):
        found.append(f"**figures**\n\n{_pairs(figures)}")
    return "\n\n".join(found)


def plot(result: Result) -> Any:
    """Milliseconds of a step by case, with those of its bytes; gaps while adapters load."""
    rows = result["steps"] if isinstance(result.get("steps"), list) else []
    figure, (axis, gaps) = panels(9, 0.4 * len(rows) + 1.8, 2)
    at = range(len(rows))
    axis.barh(at, [1e3 * r["step_seconds"] for r in rows], 0.6, color=COLOURS[OURS], label="step")
    floors = [1e3 * r["floor_seconds"] for r in rows]
    low, high = ([i + shift for i in at] for shift in (-0.4, 0.4))
    axis.vlines(floors, low, high, color="red", lw=2, label="its bytes, copied")
    axis.set_yticks(at, [f"{KINDS[r['adapters']]}, {r['requests']}" for r in rows])
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds a decode step")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    loads = result.get("loads", {})
    if "p99_ratio" in loads:
        names = ("quiet_p50", "loading_p50", "quiet_p99", "loading_p99")
        heights = [1e3 * loads[f"{name}_seconds"] for name in names]
        gaps.bar([n.replace("_", "\n") for n in names], heights, color=[MUTED, COLOURS[OURS]] * 2)
    gaps.set_ylabel("ms between tokens")
    return figure


def _card(part: Result) -> str:
    return _pairs(
        {
            "card": part["device"],
            "copy, GB/s": f"{part['copy_bytes_per_second'] / 1e9:.0f}",
            "bf16 product, TFLOP/s": f"{part['bf16_flops'] / 1e12:.0f}",
        }
    )


def _steps(rows: Sequence[Result]) -> str:
    headers = (
        *("adapters", "requests", "step, ms", "forward, ms", "slowest, ms", "floor, ms"),
        *("x floor", "tokens/s", "GB read"),
    )
    cells = [
        (
            *(KINDS[r["adapters"]], str(r["requests"])),
            *(f"{1e3 * r[key]:.2f}" for key in ("step_seconds", "forward_seconds")),
            *(f"{1e3 * r[key]:.2f}" for key in ("slowest_seconds", "floor_seconds")),
            *(f"{r['over_floor']:.2f}", f"{r['tokens_per_second']:.0f}"),
            f"{sum(r['bytes'][name] for name in BYTES) / 1e9:.2f}",
        )
        for r in rows
    ]
    return markdown(headers, cells)


def _first(rows: Sequence[Result]) -> str:
    headers = ("running streams", "prompt", "first token, ms", "slowest, ms")
    cells = [
        (
            *(str(r["streams"]), str(r["prompt"])),
            *(f"{1e3 * r[key]:.1f}" for key in ("first_token_seconds", "slowest_seconds")),
        )
        for r in rows
    ]
    return markdown(headers, cells)


def _kernels(part: Result) -> str:
    """Only what its claims name; its own table is that of benchmarks.gpu_kernels."""
    from benchmarks import gpu_kernels

    names = ("within_rounding", "repeats", "least_times_faster", "peers_agree", "peers_failed")
    summary = _pairs({name: part[name] for name in names if name in part})
    if not all(row.get("microseconds") for row in part["rows"]):
        return summary
    return f"{summary}\n\n{gpu_kernels.table(dict(part))}"


def _products(part: Result) -> str:
    """Microseconds of every way."""
    ways = list(dict.fromkeys(name for row in part["rows"] for name in row["seconds"]))
    headers = ("weights", "out x in", "rows", *ways, "bytes", "x bytes")
    cells = [
        (
            *(row["kind"], f"{row['out']} x {row['in']}", str(row["rows"])),
            *(f"{1e6 * row['seconds'][w]:.1f}" if w in row["seconds"] else "-" for w in ways),
            *(f"{1e6 * row['floor_seconds']:.1f}", f"{row['over_floor']:.2f}"),
        )
        for row in part["rows"]
    ]
    names = ("within_rounding", "largest_error", "repeats")
    return f"{_pairs({name: part[name] for name in names})}\n\n{markdown(headers, cells)}"


def _groups(part: Result) -> str:
    names = ("gptq_logits", "awq_logits", "wrong_tokens")
    return _pairs({name: part[name] for name in names if name in part})


def _taken(rows: Sequence[Result]) -> str:
    counts = list(rows[0]["by_rows"])
    cells = [
        (r["kind"], f"{r['out']} x {r['in']}", *(str(r["by_rows"][count]) for count in counts))
        for r in rows
    ]
    return markdown(("weights", "rows of x", *map(str, counts)), cells)


def _pairs(part: Result) -> str:
    cells = [
        (name, f"{value:.4g}" if isinstance(value, float) else str(value))
        for name, value in part.items()
        if not isinstance(value, list | dict) or value
    ]
    return markdown(("", "measured"), cells)
