"""What the claims name, taken from the parts of the measurement on a card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any


def figures(result: Mapping[str, Any]) -> dict[str, float]:
    """What the claims name, as far as it was measured."""
    found: dict[str, float] = {}

    def note(name: str, work: Callable[[], float]) -> None:
        with suppress(KeyError, TypeError, IndexError):  # its part failed, or was not asked for
            found[name] = work()

    def step(count: int, kind: str) -> Mapping[str, Any]:
        rows = [r for r in result["steps"] if (r["requests"], r["adapters"]) == (count, kind)]
        return rows[0]  # type: ignore[no-any-return]

    for count in (1, 16, 64):
        note(f"step_{count}_over_floor", lambda n=count: step(n, "distinct")["over_floor"])  # type: ignore[misc]
    note("step_1_base_over_floor", lambda: step(1, "none")["over_floor"])
    for kind in ("distinct", "mixtures"):
        note(
            f"{kind}_32_over_none",
            lambda k=kind: step(32, k)["tokens_per_second"] / step(32, "none")["tokens_per_second"],  # type: ignore[misc]
        )
    note(
        "over_peft",
        lambda: step(32, "distinct")["tokens_per_second"] / result["peft"]["tokens_per_second"],
    )
    note("peft_logits_error", lambda: result["peft"]["logits_error"])
    for row in result["first"] if isinstance(result.get("first"), list) else ():
        found[f"first_token_ms_{row['streams']}"] = 1e3 * row["first_token_seconds"]
    note("loading_p99_over_quiet", lambda: result["loads"]["p99_ratio"])
    for part in ("products", "kernels"):
        for name in ("within_rounding", "repeats"):
            note(f"{part}_{name}", lambda p=part, n=name: result[p][n])  # type: ignore[misc]
    note("times_faster_than_peers", lambda: result["kernels"]["least_times_faster"])
    for name in ("gptq_logits", "awq_logits"):
        note(name, lambda n=name: result["groups"][n])  # type: ignore[misc]
    note("groups_wrong_tokens", lambda: result["groups"]["wrong_tokens"])
    note("demo_wrong", lambda: result["demo"]["wrong"] + result["demo"]["other_mixtures"])
    note("tests_failed", lambda: result["tests"]["failures"] + result["tests"]["errors"])
    note("tests_status", lambda: result["tests"]["status"])
    return found
