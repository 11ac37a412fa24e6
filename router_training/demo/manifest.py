"""``bundle.json``: what a bundle holds and which adapters are registered from the start."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mora_serve.errors import InvalidArgument

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
        """Read a bundle's manifest. Raises InvalidArgument where the directory has no sound one."""
        try:
            values = json.loads((bundle / FILE).read_text())
            adapters = tuple(
                BundledAdapter(**{**a, "tasks": tuple(a["tasks"])}) for a in values.pop("adapters")
            )
            return cls(**values, adapters=adapters)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise InvalidArgument(
                f"bundle: {bundle.name} holds no {FILE} that can be read; give the directory that "
                "python -m router_training demo --out made",
                field="bundle",
            ) from e

    def write(self, bundle: Path) -> None:
        """Write the manifest into a bundle."""
        (bundle / FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
