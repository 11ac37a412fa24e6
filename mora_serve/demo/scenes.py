"""What the demo shows: each scene asks through the client and judges what came back."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mora_serve.core import Decision, Mixture, Source, Usage
from mora_serve.demo.bundle import Example
from mora_serve.errors import MoraError

if TYPE_CHECKING:
    from mora_serve.client import Client
    from mora_serve.client.requests import GenerateOptions

MAX_TOKENS = 64
STREAMS = 4  # that run while the late adapter is registered


@dataclass(frozen=True)
class Row:
    """One prompt as it went; ``problem`` is empty when all was as it should be."""

    example: Example
    decision: Decision | None = None
    text: str = ""
    usage: Usage | None = None
    problem: str = ""


@dataclass
class Load:
    """Streams that run one after another until told to stop; counts what they received."""

    client: Client
    prompt: str
    tokens: int = 0
    streams: int = 0
    errors: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Stream until ``stop``; an error ends it."""
        try:
            while not self._stop.is_set():
                with self.client.stream(
                    self.prompt, base=True, max_tokens=400, ignore_eos=True
                ) as stream:
                    for delta in stream:
                        self.tokens += len(delta.tokens)
                        if self._stop.is_set():
                            return
                self.streams += 1
        except MoraError as e:
            self.errors.append(e.message)

    def stop(self) -> None:
        """End the running stream and start no other."""
        self._stop.set()


def asked(example: Example, max_tokens: int) -> GenerateOptions:
    """The options of an example's request: its choice of adapters, greedy."""
    options: GenerateOptions = {"max_tokens": max_tokens, "temperature": 0.0}
    if example.kind == "task":
        options["task"] = example.adapter
    elif example.kind == "mixture":
        options["adapters"] = example.mixture or {}
    elif example.kind == "base":
        options["base"] = True
    return options


def ask(client: Client, example: Example) -> Row:
    """Send one example's prompt and judge what comes back."""
    options = asked(example, MAX_TOKENS)
    prompt: str | None = example.prompt
    if example.turns:
        options["messages"] = [*example.turns, ("user", example.prompt)]
        prompt = None
    try:
        result = client.generate(prompt, **options)
    except MoraError as e:
        return Row(example, problem=e.message)
    problem = judge(example, result.decision, result.text)
    return Row(example, result.decision, result.text, result.usage, problem)


def ask_all(client: Client, examples: Sequence[Example]) -> list[Row]:
    """Send all prompts at the same time; rows in the order of the examples."""
    with ThreadPoolExecutor(max(1, len(examples))) as threads:
        return list(threads.map(lambda example: ask(client, example), examples))


def judge(example: Example, decision: Decision, text: str) -> str:
    """What is not as it should be, or nothing."""
    source = {
        "task": Source.TASK,
        "mixture": Source.EXPLICIT,
        "base": Source.BASE,
        "abstain": Source.ABSTAINED,
    }.get(example.kind, Source.ROUTER)
    if decision.source is not source:
        return f"chosen by {decision.source.value}, not by {source.value}"
    wanted = example.mixture or ({example.adapter: 1.0} if example.adapter else {})
    ran = {a.adapter: a.weight for a in decision.mixture.adapters}
    if ran.keys() != wanted.keys() or any(abs(ran[k] - w) > 1e-6 for k, w in wanted.items()):
        return f"{names(decision.mixture)} answered, not {', '.join(wanted) or 'the base'}"
    if example.answer and text != example.answer:
        return f"the right answer is {example.answer!r}"
    return ""


def register_late(client: Client, example: Example, directory: str) -> tuple[Row, list[str]]:
    """Register an adapter while streams run, then let the router pick it.

    ``directory`` is relative to the server's adapter root. Returns the row of the example's prompt,
    asked right after the registration, and what went wrong with the running streams.
    """
    loads = [Load(client, f"{example.prompt} {i}") for i in range(STREAMS)]
    problems: list[str] = []
    with ThreadPoolExecutor(STREAMS) as threads:
        runs = [threads.submit(load.run) for load in loads]
        try:
            if not _all_progress(loads, [0] * STREAMS):
                problems.append("not every stream had started after 30 s")
            client.register_adapter(example.adapter, directory)
            row = ask(client, example)
            if not _all_progress(loads, [load.tokens for load in loads]):
                problems.append("a running stream stood still for 30 s after the registration")
        except MoraError as e:
            row = Row(example, problem=e.message)
        finally:
            for load in loads:
                load.stop()
            for run in runs:
                run.result()
    problems += [f"a running stream failed: {error}" for load in loads for error in load.errors]
    return row, problems


def _all_progress(loads: Sequence[Load], since: Sequence[int]) -> bool:
    """Wait until each load has more tokens than ``since``, for 30 s at most."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if all(load.tokens > n for load, n in zip(loads, since, strict=True)):
            return True
        if any(load.errors for load in loads):
            return True  # reported with the errors
        time.sleep(0.01)
    return False


def names(mixture: Mixture) -> str:
    """A mixture in words."""
    return (
        " + ".join(
            a.adapter if a.weight == 1 else f"{a.weight:g}·{a.adapter}" for a in mixture.adapters
        )
        or "base"
    )
