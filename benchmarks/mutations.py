"""Mutants of bytes and of JSON, for fuzzers: the same seed makes the same mutants."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 255, 256, 1 << 15, 1 << 16, 1 << 31, 1 << 32, 1 << 53, 1 << 62),
    *((1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 63), 10**30, 0.5, -0.0, 1e308, 1e-320),
)
TEXTS = (
    *("", "\0", ".", "..", "../../etc/passwd", "/etc/passwd", "a" * 300, "\ud800", "é", "\u202e"),
    *("%s%n", "{0.__class__}", "$(id)", "'; --", "__class__", "__metadata__", "auto_map"),
    *("(a+)+$", "(a|a)*b", "[a-", ".*" * 20, "(" * 50, "x{9999}", "\\", "NaN", "null"),
)
BYTES = (0x00, 0x01, 0x20, 0x22, 0x2C, 0x5B, 0x5C, 0x5D, 0x7B, 0x7D, 0x7F, 0x80, 0xFF)
_DEEP = 40  # levels that a mutant nests


class Mutator:
    """Makes mutants with a random generator of its own."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def data(self, data: bytes, other: bytes = b"") -> bytes:
        """Bytes, changed at some places; ``other`` lends pieces."""
        mutant = bytearray(data)
        for _ in range(self._times()):
            self._of_bytes(mutant, other or data)
        return bytes(mutant)

    def value(self, value: Any, other: Any = None) -> Any:
        """A JSON value, changed at some places; ``other`` lends pieces."""
        mutant = [copy.deepcopy(value)]
        for _ in range(self._times()):
            holder, key = self._place(mutant)
            self._of_value(holder, key, other)
        return mutant[0]

    def text(self, text: str) -> str:
        """A text, changed at some places, or another one."""
        if self.rng.random() < 0.3:
            return self.rng.choice(TEXTS)
        kept = text.encode("utf-8", "surrogatepass")
        return self.data(kept).decode("utf-8", self.rng.choice(("replace", "surrogateescape")))

    def number(self, number: float) -> float:
        """A number, a little or altogether another."""
        change = self.rng.randrange(4)
        if change == 0:
            return self.rng.choice(NUMBERS)
        if change == 1:
            return number + self.rng.choice((-4, -2, -1, 1, 2, 4))
        if change == 2 and isinstance(number, int):
            return number ^ (1 << self.rng.randrange(64))
        return self.rng.choice((-number, number * 2, number / 2))

    def json(self, value: Any) -> bytes:
        """A value as JSON, which may be a mutant itself: NaN, a key twice, other spaces."""
        text = json.dumps(value, ensure_ascii=self.rng.random() < 0.5)
        data = text.encode("utf-8", "surrogatepass")
        if self.rng.random() < 0.05 and data[:1] == b"{" and len(data) > 2:
            data = b"{" + data[1:-1] + b"," + data[1:]  # each key twice
        if self.rng.random() < 0.1:
            data = self.data(data)
        return data

    def _times(self) -> int:
        return min(1 + int(self.rng.expovariate(1.0)), 8)

    def _of_bytes(self, data: bytearray, other: bytes) -> None:
        rng = self.rng
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 4, 8, 64)))
        match rng.randrange(7):
            case 0:
                if at < len(data):
                    data[at] ^= 1 << rng.randrange(8)
            case 1:
                if at < len(data):
                    data[at] = rng.choice(BYTES)
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = bytes(data[at:end]) * rng.choice((1, 2, 16))
            case 4:
                start = rng.randrange(len(other) + 1)
                data[at:end] = other[start : start + rng.choice((1, 4, 16, 64))]
            case 5:
                width = rng.choice((1, 2, 4, 8))
                number = int(rng.choice(NUMBERS)) & ((1 << 8 * width) - 1)
                data[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
            case _:
                del data[at:]

    def _place(self, root: list[Any]) -> tuple[Any, Any]:
        """A random place in a value: what holds it, and its key."""
        holder: Any = root
        key: Any = 0
        for _ in range(_DEEP):
            value: Any = holder[key]
            if not isinstance(value, (dict, list)) or not value or self.rng.random() < 0.15:
                break
            holder = value
            key = self.rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        return holder, key

    def _of_value(self, holder: Any, key: Any, other: Any) -> None:
        rng, value = self.rng, holder[key]
        changes: list[Callable[[], Any]] = [
            lambda: rng.choice((None, True, False, [], {}, "", 0, [[]], {"": None})),
            lambda: rng.choice(NUMBERS),
            lambda: rng.choice(TEXTS),
            lambda: [copy.deepcopy(value)] * rng.choice((1, 2, 3)),
            lambda: {rng.choice(TEXTS): copy.deepcopy(value)},
            lambda: self._nested(value),
            lambda: self._piece(other),
        ]
        if isinstance(value, str):
            changes += [lambda: self.text(value)] * 8
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            changes += [lambda: self.number(value)] * 8
        elif isinstance(value, list) and value:
            changes += [lambda: value[1:], lambda: value[::-1], lambda: value + value[:1]] * 2
        elif isinstance(value, dict) and value:
            changes += [lambda: self._renamed(value), lambda: self._without(value)] * 3
        holder[key] = rng.choice(changes)()

    def _renamed(self, table: dict[str, Any]) -> dict[str, Any]:
        old = self.rng.choice(list(table))
        new = self.text(old) if self.rng.random() < 0.7 else self.rng.choice(list(table))
        return {(new if name == old else name): v for name, v in table.items()}

    def _without(self, table: dict[str, Any]) -> dict[str, Any]:
        old = self.rng.choice(list(table))
        return {name: v for name, v in table.items() if name != old}

    def _nested(self, value: Any) -> Any:
        for _ in range(self.rng.randrange(1, _DEEP)):
            value = [value] if self.rng.random() < 0.5 else {"a": value}
        return value

    def _piece(self, other: Any) -> Any:
        if other is None:
            return None
        holder, key = self._place([other])
        return copy.deepcopy(holder[key])


def safetensors(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A container with any header, right or wrong; ``length`` is what it says of the header's."""
    said = len(header) if length is None else length
    return (said & ((1 << 64) - 1)).to_bytes(8, "little") + header + data


def parts(file: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a sound safetensors file."""
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]
