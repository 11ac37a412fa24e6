"""How many adapters may be pinned: mixtures need slots besides."""

from __future__ import annotations

from collections.abc import Collection

from mora_serve.errors import ResourceExhausted


def check_pins(pinned: Collection[str], digest: str, slots: int, reserve: int) -> None:
    """Raise ResourceExhausted where one more pin would leave fewer than ``reserve`` slots."""
    if digest not in pinned and len(pinned) >= slots - reserve:
        raise ResourceExhausted(
            f"pinned: {reserve} of the {slots} slots stay free for mixtures, and the others are "
            "pinned; unpin one or raise adapters.slots",
            field="pinned",
        )
