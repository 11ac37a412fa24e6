"""The routing card: what the router and task hints know of an adapter.

It stands beside the weights as ``routing_card.json`` or comes with the registration. It holds
prompts, not the keys computed from them: keys belong to one router, and are rebuilt from the
prompts whenever the router changes.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from dataclasses import dataclass
from typing import Any

from mora_serve.adapters.untrusted import check_name, load_json, quoted
from mora_serve.config import AdaptersConfig
from mora_serve.errors import InvalidArgument

FILE = "routing_card.json"
MAX_BYTES = 4 << 20
MAX_TEXT = 8192  # characters of a description or of one prompt
MAX_TASKS = 64

_FINGERPRINT = re.compile(r"[0-9A-Za-z:._-]{0,128}")


@dataclass(frozen=True, slots=True)
class RoutingCard:
    """What an adapter is for.

    ``tasks`` are the hints that select it. ``group``: at most one adapter of a non-empty group
    runs in a routed mixture. ``prompts`` are examples that it should answer.
    ``base_fingerprint`` is the base that it was trained on and ``router_digest`` the router that
    it was trained with, both empty when unknown.
    """

    description: str = ""
    tasks: tuple[str, ...] = ()
    group: str = ""
    prompts: tuple[str, ...] = ()
    base_fingerprint: str = ""
    router_digest: str = ""

    @property
    def routable(self) -> bool:
        """Whether the router may pick the adapter unasked: only examples make that reliable."""
        return bool(self.prompts)

    def to_json(self) -> bytes:
        """The card's file."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False).encode()


def parse_card(data: bytes | memoryview, limits: AdaptersConfig) -> RoutingCard:
    """Read a ``routing_card.json``.

    Raises InvalidArgument for JSON that is not a card, an unknown key, or a limit exceeded.
    """
    return card_from(load_json(data, FILE, max_bytes=MAX_BYTES), limits)


def card_from(values: dict[str, Any], limits: AdaptersConfig) -> RoutingCard:
    """Build a card from parsed JSON; checks as in ``check_card``, types and keys besides."""
    fields = {f.name: f for f in dataclasses.fields(RoutingCard)}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(fields)}"
            raise _invalid(FILE, f"unknown key {quoted(key)}; {hint}")
        many = isinstance(fields[key].default, tuple)
        items = value if many else [value]
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise _invalid(
                key, f"it has to be {'a list of strings' if many else 'a string'}; correct it"
            )
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    card = RoutingCard(**given)
    check_card(card, limits)
    return card


def check_card(card: RoutingCard, limits: AdaptersConfig) -> None:
    """Raise InvalidArgument for a card beyond the limits or with an unusable value."""
    _check_count("tasks", len(card.tasks), MAX_TASKS, "the limit")
    _check_count("prompts", len(card.prompts), limits.max_prompts, "adapters.max_prompts")
    for task in card.tasks:
        check_name(task, "tasks")
    if card.group:
        check_name(card.group, "group")
    _check_text("description", card.description)
    for prompt in card.prompts:
        _check_text("prompts", prompt)
        if not prompt.strip():
            raise _invalid("prompts", "a prompt is empty; give text that the adapter answers")
    for field in ("base_fingerprint", "router_digest"):
        value = getattr(card, field)
        if not _FINGERPRINT.fullmatch(value):
            raise _invalid(field, f"{quoted(value)} is not a fingerprint; leave it empty")


def _check_count(field: str, count: int, most: int, name: str) -> None:
    if count > most:
        raise _invalid(field, f"{count} are more than {name} ({most}); give the best {most}")


def _check_text(field: str, text: str) -> None:
    if len(text) > MAX_TEXT:
        raise _invalid(
            field, f"{len(text)} characters are more than {MAX_TEXT}; give a shorter text"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _invalid(field, "the text holds half of a surrogate pair; give UTF-8") from None


def _invalid(field: str, message: str) -> InvalidArgument:
    return InvalidArgument(f"{field}: {message}", field=field, reason="INVALID_CARD")
