"""``bundle.json``: what a bundle holds and which adapters are registered from the start."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

FILE = "bundle.json"


@dataclass(frozen=True)
class BundledAdapter:
    """One adapter of the bundle.

    ``registered``: the server registers it at its first start; otherwise it is there to be
    registered while the server runs. ``router``: whether the router's fitting saw its task.
    """

    name: str
    directory: str
    tasks: tuple[str, ...]
    group: str
    registered: bool
    router: Literal["known", "held-out"]


@dataclass(frozen=True)
class Manifest:
    """Directories are relative to the bundle's."""

    base: str
    router: str
    base_fingerprint: str
    seed: int
    adapters: tuple[BundledAdapter, ...]

    @classmethod
    def read(cls, bundle: Path) -> Manifest:
        """Read a bundle's manifest."""
        values = json.loads((bundle / FILE).read_text())
        adapters = tuple(
            BundledAdapter(**{**a, "tasks": tuple(a["tasks"])}) for a in values.pop("adapters")
        )
        return cls(**values, adapters=adapters)

    def write(self, bundle: Path) -> None:
        """Write the manifest into a bundle."""
        (bundle / FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
