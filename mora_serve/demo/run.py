"""``mora-serve demo``: start the real server, show each way of asking, print what came of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mora_serve.cli.output import paint, shorten, table, terminal_columns
from mora_serve.demo.bundle import Example, bundle_path, read_examples
from mora_serve.demo.process import ServerProcess
from mora_serve.demo.scenes import Row, ask, ask_all, names, register_late

if TYPE_CHECKING:
    from mora_serve.client import Client

ASKED = {
    "auto": "router",
    "task": "task hint",
    "mixture": "mixture",
    "base": "base only",
    "abstain": "router",
    "chat": "chat, router",
    "late": "router, late",
}


@dataclass(frozen=True)
class Report:
    """All that the demo showed; ``problems`` are those beside the rows' own."""

    rows: tuple[Row, ...]
    problems: tuple[str, ...]
    ready_seconds: float
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether everything was as it should be."""
        return not self.problems and all(not row.problem for row in self.rows)


def run_demo() -> Report:
    """Run the whole demo on the bundled models.

    Raises MoraError when the server does not start; anything later is a problem of the report.
    """
    from mora_serve.client import Client

    start = time.monotonic()
    bundle = bundle_path()
    examples = read_examples(bundle)
    late = [e for e in examples if e.kind == "late"]
    rows: list[Row] = []
    missing = ASKED.keys() - {e.kind for e in examples}
    problems = [f"the bundle holds no example of kind {kind!r}" for kind in sorted(missing)]
    # The model is too small to gain from threads, and loses much where a core is busy elsewhere.
    flags = {"base.model": "demo", "adapters.root": bundle, "engine.threads": 1}
    with ServerProcess(flags) as server:
        _say(f"starting the server on {server.address} ...")
        with Client(server.address, timeout=60.0) as client:
            ready = server.wait_until_ready(client)
            _say(f"ready after {ready:.1f} s")
            together = [e for e in examples if e.kind in ("auto", "abstain")]
            _say(f"{len(together)} prompts at the same time, the router picks for each ...")
            rows += ask_all(client, together)
            _say("a hint, a mixture, the base alone, a chat ...")
            others = [e for e in examples if e.kind in ("task", "mixture", "base", "chat")]
            rows += ask_all(client, others)
            problems += _abstention_problems(client, rows)
            for example in late:
                _say(f"registering {example.adapter} while other answers stream ...")
                row, troubles = register_late(client, example, f"adapters/{example.adapter}")
                rows.append(row)
                problems += troubles
        if status := server.stop():
            problems.append(f"the server's exit status was {status}; its log ends:\n{server.log}")
    return Report(tuple(rows), tuple(problems), ready, time.monotonic() - start)


def _abstention_problems(client: Client, rows: Sequence[Row]) -> list[str]:
    """An abstention has to give the very text of the base alone."""
    found = []
    for row in rows:
        if row.example.kind == "abstain" and not row.problem:
            base = ask(client, Example("base", row.example.prompt))
            if base.problem or base.text != row.text:
                found.append(f"{row.example.prompt!r}: an abstention and the base alone differ")
    return found


def show(report: Report) -> str:
    """The report for people: a table, what else went wrong, a last line."""
    wide = terminal_columns()
    prompt_columns = max(28, wide - 96)
    rows = [
        (
            shorten(_prompt(row), prompt_columns),
            ASKED[row.example.kind],
            shorten(_answered(row), 30),
            shorten(row.text.strip() or "-", 24),
            _verdict(row),
            *_speed(row),
        )
        for row in report.rows
    ]
    headers = ("prompt", "asked", "answered by (chosen by)", "answer", "", "first", "tokens/s")
    lines = [table(headers, rows, right=(5, 6)), ""]
    lines += [f"{_prompt(r)}: {r.problem}" for r in report.rows if r.problem]
    lines += report.problems
    wrong = sum(bool(row.problem) for row in report.rows) + len(report.problems)
    verdict = (
        paint("everything as it should be", "green")
        if report.ok
        else paint(f"{wrong} not as it should be", "red")
    )
    lines.append(
        f"{verdict}: {len(report.rows)} prompts, {report.seconds:.1f} s, of which "
        f"{report.ready_seconds:.1f} s to start the server"
    )
    return "\n".join(lines)


def as_json(report: Report) -> dict[str, Any]:
    """The report for programs."""
    return {
        "ok": report.ok,
        "seconds": report.seconds,
        "ready_seconds": report.ready_seconds,
        "problems": list(report.problems),
        "rows": [
            {
                "kind": row.example.kind,
                "prompt": row.example.prompt,
                "mixture": {a.adapter: a.weight for a in row.decision.mixture.adapters}
                if row.decision
                else None,
                "source": row.decision.source.value if row.decision else None,
                "answer": row.text,
                "expected": row.example.answer or None,
                "problem": row.problem,
                "first_token_seconds": row.usage.first_token_seconds if row.usage else None,
                "tokens_per_second": _rate(row),
            }
            for row in report.rows
        ],
    }


def _prompt(row: Row) -> str:
    return "… " + row.example.prompt if row.example.turns else row.example.prompt


def _answered(row: Row) -> str:
    if row.decision is None:
        return "-"
    return f"{names(row.decision.mixture)} ({row.decision.source.value})"


def _verdict(row: Row) -> str:
    if row.problem:
        return paint("WRONG", "red")
    return paint("right" if row.example.answer else "as meant", "green")


def _rate(row: Row) -> float | None:
    usage = row.usage
    if usage is None or usage.completion_tokens < 2:
        return None
    seconds = usage.total_seconds - usage.first_token_seconds
    return (usage.completion_tokens - 1) / seconds if seconds > 0 else None


def _speed(row: Row) -> tuple[str, str]:
    if row.usage is None:
        return "-", "-"
    rate = _rate(row)
    return f"{row.usage.first_token_seconds * 1e3:.0f} ms", "-" if rate is None else f"{rate:.0f}"


def _say(text: str) -> None:
    print(paint(text, "dim", sys.stderr), file=sys.stderr, flush=True)
