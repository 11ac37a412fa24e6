"""Tables in Markdown of the benchmarks' parts, and the section of the README that shows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import KINDS
from benchmarks.turns import OURS

Result = Mapping[str, Any]

BEGIN = "<!-- written by python -m benchmarks --readme: begin -->"
END = "<!-- written by python -m benchmarks --readme: end -->"


def markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; columns after the first are right-aligned."""
    rule = ["---", *("---:" for _ in headers[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headers, rule, *rows))


def throughput(result: Result) -> str:
    """Every system at every number of requests."""
    headers = (
        *("adapters", "requests", "system", "tokens/s", "least", "most"),
        *("first token, ms", "p99", "between tokens, ms", "p99", "runs", "new tokens"),
    )
    rows = []
    for r in result["rows"]:
        named = (KINDS[r["adapters"]], str(r["requests"]), r["system"])
        if "failure" in r:
            rows.append((*named, f"cannot: {r['failure']}", *[""] * 8))
            continue
        rows.append((*named, *_rates(r), *_latency(r), str(r["repetitions"]), str(r["new_tokens"])))
    ratios = result["peers"].get("ratios", {}).get("over_generate", {})
    peers = [
        (
            *(name, f"{r['here']:.3f}", f"{r['earlier']:.3f}"),
            *(f"{r['tokens_per_second']:.1f}", f"{r['earlier_tokens_per_second']:.1f}"),
        )
        for name, r in ratios.items()
    ]
    figures = [(name, f"{value:.2f}") for name, value in result["figures"].items()]
    return "\n\n".join(
        (
            markdown(headers, rows),
            markdown(("ratio of ours", "measured"), figures),
            markdown(
                (
                    *("peers' rates over generate at 16 requests", "here", "earlier"),
                    *("tokens/s here", "tokens/s earlier"),
                ),
                peers,
            ),
            *(f"- {note}" for note in result["peers"].get("notes", [])),
        )
    )


def growth(result: Result) -> str:
    """A table a sweep."""
    found = []
    for name, rows in result["sweeps"].items():
        headers = (
            *(name, "requests", "system", "tokens/s", "least", "most"),
            *("first token, ms", "p99", "between tokens, ms", "p99"),
        )
        cells = []
        for r in rows:
            kind = f", {KINDS[r['adapters']]}" if "adapters" in r else ""
            named = (f"{r[name]}{kind}", str(r["requests"]), r["system"])
            failed = (f"cannot: {r.get('failure')}", *[""] * 6)
            cells.append((*named, *(failed if "failure" in r else (*_rates(r), *_latency(r)))))
        found.append(markdown(headers, cells))
    return "\n\n".join(found)


def overhead(result: Result) -> str:
    """Streaming, routing, start-up, memory: those that were measured."""
    rows = []
    if "streaming" in result:
        for kind in ("none", "distinct"):
            r = result["streaming"][kind]
            rows += [
                (f"tokens/s in-process, {KINDS[kind]}", f"{r['in_process']:.1f}"),
                (f"tokens/s through gRPC streaming, {KINDS[kind]}", f"{r['streamed']:.1f}"),
                (f"lost, {KINDS[kind]}", f"{r['lost']:.3f}"),
            ]
    if "routing" in result:
        adapters, part = result["routing"]["adapters"], result["routing"]["first_token_ms"]
        rows.append((f"routing among {adapters} adapters in the first token, ms", f"{part:.2f}"))
    if "startup" in result:
        rows.append(("first answer after the start, s", f"{result['startup']['seconds']:.2f}"))
    for name, size in result.get("memory", {}).get("bytes", {}).items():
        rows.append((f"memory, {name}, MB", f"{size / 1e6:.1f}"))
    return markdown(("", "measured"), rows)


def registered(result: Result) -> str:
    """Saturated rounds and Poisson arrivals, by popularity and number of adapters."""
    named = ("popularity", "registered adapters")
    first = ("loads a request", "first token, ms", "p99")
    saturated = [
        (
            *(r["popularity"], str(r["adapters"]), f"{r['tokens_per_second']:.1f}"),
            *(f"{r['ratio']:.3f}", f"{r['misses_per_request']:.2f}"),
            *(percentile(r["first_token_ms"], p) for p in ("p50", "p99")),
        )
        for r in result["saturated"]
    ]
    arriving = [
        (
            *(r["popularity"], str(r["adapters"]), f"{r['rate']:.2f}"),
            *(f"{r['misses_per_request']:.2f}", *_latency(r)),
        )
        for r in result["poisson"]
    ]
    between = ("between tokens, ms", "p99")
    return "\n\n".join(
        (
            markdown((*named, "tokens/s, saturated", "ratio to the fewest", *first), saturated),
            markdown((*named, "requests/s, Poisson", *first, *between), arriving),
        )
    )


def residency(result: Result) -> str:
    """Times between messages of streams alone and beside new adapters."""
    rows = [
        (label, *(percentile(result[key], p, digits) for p in ("p50", "p90", "p99", "max")))
        for label, key, digits in (
            ("streams alone, ms", "quiet_ms", 1),
            ("new adapters beside them, ms", "busy_ms", 1),
            ("ratio", "ratio", 2),
        )
    ]
    used = result["register_and_use_ms"]
    rows.append(
        (
            "from registering an adapter to its answer, ms",
            *(percentile(used, p, 0) for p in ("p50", "p90", "p99", "max")),
        )
    )
    asked = result["arguments"]["repeat"] * result["arguments"]["adapters"]
    rows.append((f"failed or late, of {asked}", str(result["failed"]), "", "", ""))
    return markdown(("", "p50", "p90", "p99", "most"), rows)


def over_products(row: Result) -> float:
    """A step over its bare 4-bit products."""
    return float(row["step_seconds"] / row["products_seconds"])


STEP_HEADERS = (
    *("adapters", "requests", "step, ms", "4-bit products, ms", "bytes, ms"),
    *("step / products", "copy, GB/s"),
)


def step_cells(rows: Iterable[Result]) -> list[tuple[str, ...]]:
    """What stands under ``STEP_HEADERS``."""
    return [
        (
            *(KINDS[r["adapters"]], str(r["requests"])),
            *(f"{1e3 * r[f'{name}_seconds']:.2f}" for name in ("step", "products", "bytes")),
            *(f"{over_products(r):.2f}", f"{r['copy_bytes_per_second'] / 1e9:.1f}"),
        )
        for r in rows
    ]


def step(result: Result) -> str:
    """A step beside its floors."""
    return markdown(STEP_HEADERS, step_cells(result["rows"]))


def others(result: Result) -> str:
    """Every number of a part that has no table of its own."""
    return markdown(("", "measured"), [(k, f"{v:.4g}") for k, v in _numbers(result)])


def where(result: Result) -> str:
    """Date, machine and versions of a part."""
    there = result["environment"]
    machine, versions = there["machine"], there["versions"]
    load = ", ".join(f"{x:g}" for x in there["load"])
    return (
        f"{there['date'][:10]}, {machine['cores']} cores ({machine['processor']}), load {load}; "
        f"torch {versions['torch']}, transformers {versions['transformers']}, "
        f"peft {versions['peft']}, bitsandbytes {versions['bitsandbytes']}"
    )


def readme(results: Mapping[str, Result], pictures: Mapping[str, str]) -> str:
    """The README's section: ours beside the best peer at each number of requests, and pictures.

    ``pictures`` are the paths of the parts' pictures, from the README.
    """
    parts = []
    if "throughput" in results:
        headers = ("adapters", "requests", OURS, "best peer", "its tokens/s", "ratio")
        rows = results["throughput"]["rows"]
        lines = []
        for ours in (r for r in rows if r["system"] == OURS):
            cell = ours["adapters"], ours["requests"]
            rate = ours["tokens_per_second"]
            peers = [
                (
                    r["ours_until_there"] / r["tokens_per_second"],
                    r["tokens_per_second"],
                    r["system"],
                )
                for r in rows
                if (r["adapters"], r["requests"]) == cell and r is not ours and "failure" not in r
            ]
            ratio, best, name = min(peers, default=(0.0, 0.0, ""))
            named = (KINDS[ours["adapters"]], str(ours["requests"]), f"{rate:.0f}")
            missing = "none can" if ours["adapters"] == "mixtures" else "not measured"
            against = (name, f"{best:.0f}", f"{ratio:.2f}") if peers else (missing, "", "")
            lines.append((*named, *against))
        work = results["throughput"]["arguments"]
        parts += [
            "Tokens a second of whole requests, prompts included, through gRPC streaming, beside "
            f"transformers and PEFT on the same model (a Llama of {work['layers']} layers, hidden "
            f"size {work['hidden']}, NF4), prompts ({work['prompt']} tokens) and adapters (rank "
            f"{work['rank']}), in turn; ratios at as many tokens of each answer. "
            f"{where(results['throughput'])}.",
            markdown(headers, lines),
        ]
    parts += [f"![{name}]({path})" for name, path in pictures.items() if name in results]
    return "\n\n".join(parts)


def write_readme(path: Path, section: str) -> None:
    """Put the section between its markers. Raises ValueError where they are missing."""
    text = path.read_text()
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"{path.name} has no markers; put in the lines {BEGIN!r} and {END!r}")
    path.write_text(f"{before}{BEGIN}\n\n{section}\n\n{END}{after}")


def _rates(r: Result) -> tuple[str, ...]:
    return tuple(f"{r[key]:.1f}" for key in ("tokens_per_second", "least", "most"))


def _latency(r: Result) -> tuple[str, ...]:
    kinds = (r["first_token_ms"], r["inter_token_ms"])
    return tuple(percentile(kind, p) for kind in kinds for p in ("p50", "p99"))


def percentile(milliseconds: Mapping[str, float], name: str, digits: int = 1) -> str:
    """One of ``open_loop.percentiles`` for people; empty where there was nothing to measure."""
    return f"{milliseconds[name]:.{digits}f}" if name in milliseconds else ""


def _numbers(value: Any, path: str = "") -> Iterable[tuple[str, float]]:
    """The numbers of nested objects, by dotted path; lists, arguments and the machine left out."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in ("environment", "arguments"):
                yield from _numbers(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, float(value)
