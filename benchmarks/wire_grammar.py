"""Messages for fuzzing, made from their descriptors: some plausible, some wild, some no messages.

Everything is drawn from one ``random.Random``, so the same seed makes the same message again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

STRINGS = (
    *("", " ", "\0", "a\0b", "\n", "\r\n[error] forged", "\x1b[2J", "\u202e", "\ufeff", "\ud7ff"),
    *(
        "é",
        "日本語",
        "🙂" * 50,
        "a" * 64,
        "a" * 65,
        "A" * 257,
        "x" * 5000,
        "%s%n%x",
        "{0.__class__}",
    ),
    *("../../etc/passwd", "/etc/passwd", "/proc/self/environ", "..", ".", "/", "a/../b", "C:\\x"),
    *("'; drop table x; --", "${jndi:ldap://x}", "<script>", "null", "None", "NaN", "0", "-1"),
)
INTEGERS = (0, 1, 2, 3, 7, 127, 128, 255, 256, 319, 4096, 65535, 1 << 20, (1 << 31) - 1, 1 << 31)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 10.0, 1e-45, 1e-30, 3e38, math.inf, -math.inf, math.nan)
BYTES = (b"", b"\0", b"\xff" * 8, b"\x08" + b"\xff" * 9 + b"\x01", b"\x0b" * 200, b"{}", b"[" * 999)
_LIMITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}


@dataclass(frozen=True)
class Vocabulary:
    """Values that mean something to this server, by the name of the field that takes them."""

    values: dict[str, Sequence[Any]] = field(default_factory=dict)
    often: frozenset[str] = frozenset()  # fields without which little happens
    repeats: int = 4  # values of a repeated field, as a rule


class Grammar:
    """Makes messages of any type; ``wildness`` is how often a value is not a plausible one."""

    def __init__(self, vocabulary: Vocabulary, rng: random.Random, wildness: float) -> None:
        self._vocabulary = vocabulary
        self._rng = rng
        self._wildness = wildness

    def message(self, descriptor: Descriptor) -> Message:
        """A message of a type, some of its fields set."""
        rng, message = self._rng, message_factory.GetMessageClass(descriptor)()
        part = 0.95 if not self._wildness else 0.85
        chosen = {
            oneof.name: rng.choice(oneof.fields).name
            for oneof in descriptor.oneofs
            if rng.random() < part
        }
        for f in descriptor.fields:
            oneof = f.containing_oneof
            if oneof is not None and len(oneof.fields) > 1:
                present = chosen.get(oneof.name) == f.name
            else:
                telling = f.message_type or f.name in self._vocabulary.often
                present = rng.random() < (part if telling else 0.4)
            if present:
                self._set(message, f)
        return message

    def _set(self, message: Message, f: FieldDescriptor) -> None:
        rng = self._rng
        if f.is_repeated:
            count = rng.randrange(1, self._vocabulary.repeats + 1)
            if rng.random() < self._wildness / 10:
                count = rng.choice((17, 65, 300))
            into = getattr(message, f.name)
            for _ in range(count):
                into.append(self._value(f))
        elif f.message_type is not None:
            inner = getattr(message, f.name)
            inner.SetInParent()
            inner.CopyFrom(self.message(f.message_type))
        else:
            setattr(message, f.name, self._value(f))

    def _value(self, f: FieldDescriptor) -> Any:
        rng = self._rng
        if f.message_type is not None:
            return self.message(f.message_type)
        known = self._vocabulary.values.get(f.name)
        if known and rng.random() >= self._wildness:
            return rng.choice(known)
        if f.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        if f.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
            return rng.choice(FLOATS) if rng.random() < 0.7 else rng.uniform(-3, 3)
        if f.enum_type is not None:
            return rng.choice(f.enum_type.values).number
        if f.cpp_type in _LIMITS:
            low, high = _LIMITS[f.cpp_type]
            return rng.choice((low, high, *(i for i in INTEGERS if i <= high)))
        if f.type == FieldDescriptor.TYPE_BYTES:
            return rng.choice(BYTES) if rng.random() < 0.7 else rng.randbytes(rng.randrange(300))
        return rng.choice(STRINGS) if rng.random() < 0.8 else text(rng, rng.randrange(40))


def text(rng: random.Random, length: int) -> str:
    """Random characters of all planes, surrogates apart."""
    codes = (rng.choice((rng.randrange(128), rng.randrange(0x110000))) for _ in range(length))
    return "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)


def mutated(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """``data`` with one to four changes of its bytes; parts of ``other`` may take their place."""
    for _ in range(rng.randrange(1, 5)):
        data = rng.choice(_CHANGES)(data, rng, other)
    return data


def _flip(data: bytes, rng: random.Random, _: bytes) -> bytes:
    if not data:
        return data
    i = rng.randrange(len(data))
    return data[:i] + bytes([data[i] ^ (1 << rng.randrange(8))]) + data[i + 1 :]


def _overwrite(data: bytes, rng: random.Random, _: bytes) -> bytes:
    i = rng.randrange(len(data) + 1)
    return data[:i] + rng.choice(BYTES)[: rng.randrange(1, 12)] + data[i + 1 :]


def _insert(data: bytes, rng: random.Random, other: bytes) -> bytes:
    i = rng.randrange(len(data) + 1)
    part = rng.choice((other, rng.choice(BYTES), rng.randbytes(rng.randrange(1, 9))))
    return data[:i] + part + data[i:]


def _cut(data: bytes, rng: random.Random, _: bytes) -> bytes:
    i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:i] + data[j:]


def _truncate(data: bytes, rng: random.Random, _: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _double(data: bytes, rng: random.Random, _: bytes) -> bytes:
    i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:j] + data[i:j] + data[j:]


_CHANGES: tuple[Callable[[bytes, random.Random, bytes], bytes], ...] = (
    *(_flip, _overwrite, _insert, _cut, _truncate, _double),
)
