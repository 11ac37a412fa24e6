"""How good a bundle is, measured on fresh prompts; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from router_training.demo.loaded import LoadedBundle
from router_training.demo.routing import measure_router
from router_training.demo.tasks import TASKS, Split

SYSTEM_TURN = "You are a helpful assistant. Answer briefly and do not explain."
FRESH_SEED = 1_000_000  # no fitting draws from these seeds


def evaluate(bundle: Path, seed: int = FRESH_SEED, prompts: int = 48) -> dict[str, Any]:
    """Measure a bundle directory on ``prompts`` prompts a task from each set of templates.

    Answers are generated greedily on the server's decoder; only the whole answer counts. The
    result has a row a task (exact match on trained templates, on templates kept for testing, and
    of the base alone on the former), their means, the mean on kept templates in a chat with a
    system turn, the router's figures, and the size in bytes.
    """
    loaded = LoadedBundle(bundle)
    columns = (
        _exact_match(loaded, "train", seed, prompts),
        _exact_match(loaded, "test", seed, prompts),
        _exact_match(loaded, "train", seed, prompts, adapted=False),
    )
    in_chats = _exact_match(loaded, "test", seed, prompts, system=SYSTEM_TURN)
    rows = {
        name: {"new_prompts": new, "new_templates": held, "base": alone}
        for name, new, held, alone in zip(loaded.names, *columns, strict=True)
    }
    return {
        "tasks": rows,
        "new_prompts_mean": _mean([r["new_prompts"] for r in rows.values()]),
        "new_templates_mean": _mean([r["new_templates"] for r in rows.values()]),
        "base_mean": _mean([r["base"] for r in rows.values()]),
        "system_turn_mean": _mean(in_chats),
        "new_prompts_least": min(r["new_prompts"] for r in rows.values()),
        "new_templates_least": min(r["new_templates"] for r in rows.values()),
        "router": measure_router(loaded, seed, prompts),
        "prompts_a_task": prompts,
        "seed": seed,
        "bytes": sum(f.stat().st_size for f in bundle.rglob("*") if f.is_file()),
    }


def _exact_match(
    loaded: LoadedBundle,
    split: Split,
    seed: int,
    prompts: int,
    *,
    adapted: bool = True,
    system: str = "",
) -> list[float]:
    """Share of right answers of each task, under its own adapter or under none."""
    cases = [c for name in loaded.names for c in TASKS[name].examples(seed, prompts, split)]
    ahead = [("system", system)] if system else []
    ids = [loaded.base.tokenizer.chat([*ahead, ("user", prompt)]) for prompt, _ in cases]
    mixtures = [(name,) if adapted else () for name in loaded.names for _ in range(prompts)]
    limit = 1 + max(len(answer.encode()) for _, answer in cases)
    texts = loaded.answers(ids, mixtures, limit)
    right = [text == want for text, (_, want) in zip(texts, cases, strict=True)]
    return [_mean(right[i : i + prompts]) for i in range(0, len(right), prompts)]


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)
