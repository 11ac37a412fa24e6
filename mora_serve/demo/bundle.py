"""The embedded bundle: where it is, how it is registered, and the examples to show."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mora_serve.core import DEFAULT_TENANT
from mora_serve.errors import ConfigError, MoraError

if TYPE_CHECKING:
    from mora_serve.adapters.registry import Registry
    from mora_serve.config import AdaptersConfig
    from mora_serve.model.shape import ModelShape

MANIFEST_FILE = "bundle.json"
EXAMPLES_FILE = "examples.json"

log = logging.getLogger(__name__)


def bundle_path() -> Path:
    """The directory of the bundle that ships in the package.

    Raises ConfigError when this installation has none.
    """
    path = Path(__file__).with_name("bundle")
    if not (path / MANIFEST_FILE).is_file():
        raise ConfigError(
            "base.model: 'demo' asks for the bundled models, but this installation has none; make "
            "them with: python -m router_training demo --out mora_serve/demo/bundle",
            field="base.model",
        )
    return path


Kind = Literal["auto", "task", "mixture", "base", "abstain", "chat", "late"]


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt of the demo and what should come of it.

    ``kind`` says how it is asked: routed (``auto``, ``chat``; ``abstain`` where no adapter fits;
    ``late`` for an adapter that is registered while the demo runs), hinted (``task``), with the
    ``mixture``, or without adapters (``base``). ``adapter`` is the one that should answer, empty
    for none. ``answer`` is empty where no answer is right or wrong. ``turns`` are the (role,
    text) turns ahead of the prompt in a chat.
    """

    kind: Kind
    prompt: str
    adapter: str = ""
    answer: str = ""
    mixture: Mapping[str, float] | None = None
    turns: tuple[tuple[str, str], ...] = ()


def read_examples(bundle: Path) -> tuple[Example, ...]:
    """The examples of a bundle."""
    values: list[dict[str, Any]] = json.loads((bundle / EXAMPLES_FILE).read_text())
    return tuple(
        Example(**{**v, "turns": tuple((role, text) for role, text in v.get("turns", ()))})
        for v in values
    )


def register_bundle(
    registry: Registry, shape: ModelShape, limits: AdaptersConfig, tenant: str = DEFAULT_TENANT
) -> None:
    """Register the bundle's adapters for a tenant, and its router.

    Only the adapters that the manifest marks so; a name that is in use, and a router that is
    stored, stay as they are, so that a restart changes nothing. What is damaged in the registry is
    replaced by what ships; where the disk does not take it, the rest is served without it. Raises
    MoraError when the limits of the configuration are too small for the bundle.
    """
    from mora_serve.adapters.validate import read_directory

    bundle = bundle_path()
    manifest = json.loads((bundle / MANIFEST_FILE).read_text())
    known = registry.own(tenant)
    for entry in manifest["adapters"]:
        name = entry["name"]
        before = known.get(name)
        if not entry["registered"] or (before is not None and not registry.damaged(before)):
            continue
        adapter = read_directory(bundle, entry["directory"], shape, limits)
        if before is None or before.digest == adapter.digest:
            with _whatever_the_disk(name):
                registry.register(tenant, name, adapter)
    if registry.router() is None:
        files = sorted((bundle / manifest["router"]).iterdir())
        with _whatever_the_disk("router"):
            registry.set_router({file.name: file.read_bytes() for file in files})


@contextlib.contextmanager
def _whatever_the_disk(name: str) -> Iterator[None]:
    """Go on without what the disk does not take."""
    try:
        yield
    except MoraError as e:
        if e.reason not in ("DISK_FULL", "DISK_FAILED"):
            raise
        log.error("bundle: %s is left out: %s", name, e.message)
