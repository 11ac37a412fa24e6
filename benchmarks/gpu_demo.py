"""The demo's prompts served on a card and on the CPU: equal answers, near-ties of logits aside."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mora_serve.client import Client
from mora_serve.client.connection import Result
from mora_serve.demo.bundle import Example, bundle_path, read_examples
from mora_serve.demo.process import ServerProcess
from mora_serve.demo.scenes import asked, judge

KINDS = ("auto", "task", "abstain", "base", "mixture")
NEAR = 0.05  # of two log-probabilities: the rounding of bf16 decides between such tokens
TOKENS, AT_A_TIME = 32, 8


def measure(device: str, most: int = 1000, seconds: float = 300.0) -> dict[str, Any]:
    """Ask all examples on both, up to ``most``; where answers part, and whether at a near-tie.

    Raises where that takes more than ``seconds``.
    """
    until = time.monotonic() + seconds
    examples = [e for e in read_examples(bundle_path()) if e.kind in KINDS and not e.turns][:most]
    cpu, card = (answers(name, examples, until) for name in ("cpu", device))
    return compared(examples, cpu, card)


def compared(
    examples: Sequence[Example], cpu: Sequence[Result], card: Sequence[Result]
) -> dict[str, Any]:
    """What ``measure`` returns, of the answers of both."""
    parted = [i for i, (c, d) in enumerate(zip(cpu, card, strict=True)) if ids(c) != ids(d)]
    wrong = [examples[i].prompt for i in parted if not at_a_near_tie(cpu[i], card[i])]
    judged = [judge(e, a.decision, a.text) for e, a in zip(examples, card, strict=True)]
    other = [
        e.prompt
        for e, a, b in zip(examples, cpu, card, strict=True)
        if a.decision.mixture != b.decision.mixture
    ]
    return {
        "examples": len(examples),
        "equal": len(examples) - len(parted),
        "parted_at_near_ties": len(parted) - len(wrong),
        "wrong": len(wrong),
        "other_mixtures": len(other),
        "problems": [problem for problem in judged if problem],
        "wrong_prompts": wrong[:5],
    }


def answers(device: str, examples: Sequence[Example], until: float) -> list[Result]:
    """Greedy, with the log-probabilities of the nearest tokens; those that come ``until`` then."""
    flags = {"base.device": device, "base.dtype": "bf16", "engine.threads": 1}
    with ServerProcess(flags) as server, Client(server.address, timeout=300.0) as client:
        server.wait_until_ready(client, timeout=max(1.0, until - time.monotonic()))

        def ask(example: Example) -> Result:
            options = asked(example, TOKENS)
            options["logprobs"] = 5
            options["timeout"] = max(1.0, until - time.monotonic())
            return client.generate(example.prompt, **options)

        with ThreadPoolExecutor(AT_A_TIME) as threads:
            return list(threads.map(ask, examples))


def ids(answer: Result) -> list[int]:
    """The token ids of an answer."""
    return [token.id for token in answer.tokens]


def at_a_near_tie(one: Result, other: Result) -> bool:
    """Whether the first token in which two answers differ was nearly as likely as the other's."""
    for a, b in zip(one.tokens, other.tokens, strict=False):
        if a.id != b.id:
            found = dict(a.top)
            return a.logprob is not None and a.logprob - found.get(b.id, -9.0) <= NEAR
    return False  # one is the beginning of the other
