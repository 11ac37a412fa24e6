"""What a run leaves beside an adapter's weights: its routing card and its manifest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from mora_serve.adapters.card import FILE as CARD_FILE
from mora_serve.adapters.card import RoutingCard
from mora_serve.model.loading import BaseFiles
from router_training.tuning.settings import TuneSettings

MANIFEST_FILE = "manifest.json"
_PACKAGES = ("mora-serve", "torch", "transformers", "peft", "trl", "bitsandbytes")


@dataclass(frozen=True)
class Facts:
    """Of a trained adapter: its base, the digest of all rows, steps and trained parameters."""

    name: str
    base: BaseFiles
    data_digest: str
    steps: int
    trained_parameters: int


def write_card(
    directory: Path, settings: TuneSettings, prompts: Iterable[str], rows: int, fingerprint: str
) -> None:
    """The routing card, with some different prompts from all over the training rows."""
    different = list(dict.fromkeys(prompt for prompt in prompts if prompt))
    shown = min(settings.card_prompts, len(different))
    spread = [different[i * len(different) // shown] for i in range(shown)]
    card = RoutingCard(
        description=f"trained by mora-serve on {rows} rows",
        tasks=settings.register_tasks,
        prompts=tuple(spread),
        base_fingerprint=fingerprint,
    )
    (directory / CARD_FILE).write_bytes(card.to_json())


def write_manifest(
    directory: Path,
    settings: TuneSettings,
    facts: Facts,
    rows: Mapping[str, int],
    metrics: Mapping[str, float],
) -> None:
    """What the adapter was made of and by, and how well it does."""
    manifest = {
        "name": facts.name,
        "base_fingerprint": facts.base.fingerprint,
        "settings": dataclasses.asdict(settings),
        "data_digest": facts.data_digest,
        "rows": dict(rows),
        "steps": facts.steps,
        "trained_parameters": facts.trained_parameters,
        "metrics": dict(metrics),
        "versions": {name: version(name) for name in _PACKAGES},
    }
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n")


def add_metrics(directory: Path, metrics: Mapping[str, object]) -> None:
    """Put more metrics in the manifest that is there."""
    file = directory / MANIFEST_FILE
    manifest = json.loads(file.read_text())
    manifest["metrics"] = {**manifest["metrics"], **metrics}
    file.write_text(json.dumps(manifest, indent=1) + "\n")
