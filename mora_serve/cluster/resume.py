"""A stream that goes on where another replica has begun it.

The same request with the same seed gives the same tokens on every replica, near-ties of the logits
aside. So a request whose replica is gone is computed anew by another one, and what its caller has
already is left out. Where the two differ in that part, the answer cannot go on.
"""

from __future__ import annotations

from dataclasses import replace

from mora_serve.core import Event


class Diverged(Exception):
    """The new replica's answer does not begin as that of the old one did."""


class Sent:
    """What one caller has been sent."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._texts: list[str] = []
        self._text = ""  # all of it, as it was when the answer was begun anew
        self._tokens_at = self._text_at = 0  # in the answer that comes now

    def restart(self) -> None:
        """The answer comes anew, from its first token."""
        self._text = "".join(self._texts)
        self._tokens_at = self._text_at = 0

    def rest(self, event: Event) -> Event | None:
        """What of an event is new to the caller; None for nothing. Raises Diverged."""
        known = self._ids[self._tokens_at : self._tokens_at + len(event.tokens)]
        text = self._text[self._text_at : self._text_at + len(event.text)]
        ids = [t.id for t in event.tokens]
        if ids[: len(known)] != known or not event.text.startswith(text):
            raise Diverged
        self._tokens_at += len(ids)
        self._text_at += len(event.text)
        if event.finish is not None and event.error is None and self._tokens_at < len(self._ids):
            raise Diverged
        event = replace(event, tokens=event.tokens[len(known) :], text=event.text[len(text) :])
        self._ids += ids[len(known) :]
        if event.text:
            self._texts.append(event.text)
        return event if event.tokens or event.text or event.finish is not None else None
