"""Messages to core nouns, checked: every error names the field, the value and the remedy."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from mora_serve.adapters.untrusted import quoted
from mora_serve.config import Config
from mora_serve.core import SamplingParams
from mora_serve.errors import InvalidArgument
from mora_serve.v1 import generation_pb2 as pb

ROLES = ("system", "user", "assistant", "tool")
MAX_STOP_CHARACTERS = 256
DEFAULT_MAX_TOKENS = 256

# SamplingParams field -> (lowest, highest, whether the lowest itself is allowed)
_RANGES = {
    "temperature": (0.0, 10.0, True),
    "top_p": (0.0, 1.0, False),
    "min_p": (0.0, 1.0, True),
    "repetition_penalty": (0.0, 10.0, False),
    "presence_penalty": (-2.0, 2.0, True),
    "frequency_penalty": (-2.0, 2.0, True),
}


def invalid(field: str, message: str, reason: str | None = None) -> InvalidArgument:
    """The error for a field."""
    return InvalidArgument(f"{field}: {message}", field=field, reason=reason)


def sampling_of(message: pb.SamplingParams, config: Config, vocab_size: int) -> SamplingParams:
    """Sampling parameters; what is unset takes its default, the seed is drawn.

    Raises InvalidArgument for a value out of range or beyond the server's limits.
    """
    values: dict[str, Any] = {}
    for name, (low, high, inclusive) in _RANGES.items():
        if name in ("top_p", "repetition_penalty") and not message.HasField(name):
            continue
        value = getattr(message, name)
        if not (low <= value <= high) or (value == low and not inclusive):
            interval = f"from {low:g}" if inclusive else f"above {low:g}, up"
            raise invalid(
                f"sampling.{name}",
                f"{value:g} is out of range; give a number {interval} to {high:g}",
            )
        values[name] = value
    limits = config.engine
    default = min(DEFAULT_MAX_TOKENS, limits.max_tokens)
    max_tokens = message.max_tokens if message.HasField("max_tokens") else default
    if not 1 <= max_tokens <= limits.max_tokens:
        raise invalid(
            "sampling.max_tokens",
            f"{max_tokens} is out of range; give a number from 1 to {limits.max_tokens}",
        )
    logprobs = message.logprobs if message.HasField("logprobs") else None
    if logprobs is not None and logprobs > limits.max_logprobs:
        raise invalid(
            "sampling.logprobs", f"{logprobs} is too many; ask for at most {limits.max_logprobs}"
        )
    _check_stops(message, limits.max_stop, vocab_size)
    return SamplingParams(
        max_tokens=max_tokens,
        top_k=message.top_k,
        seed=message.seed if message.HasField("seed") else secrets.randbits(63),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=logprobs,
        **values,
    )


def _check_stops(message: pb.SamplingParams, most: int, vocab_size: int) -> None:
    for name in ("stop", "stop_token_ids"):
        count = len(getattr(message, name))
        if count > most:
            raise invalid(f"sampling.{name}", f"{count} are too many; give at most {most}")
    for i, stop in enumerate(message.stop):
        if not stop:
            raise invalid(f"sampling.stop[{i}]", "it is empty; give some text or leave it out")
        if len(stop) > MAX_STOP_CHARACTERS:
            raise invalid(
                f"sampling.stop[{i}]",
                f"{len(stop)} characters are too long; give at most {MAX_STOP_CHARACTERS}",
            )
    check_ids("sampling.stop_token_ids", message.stop_token_ids, vocab_size)


def check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raise InvalidArgument for an id outside the vocabulary."""
    if ids and max(ids) >= vocab_size:
        i = next(i for i, token in enumerate(ids) if token >= vocab_size)
        raise invalid(
            f"{field}[{i}]",
            f"{ids[i]} is not in the vocabulary; give ids from 0 to {vocab_size - 1}",
            "UNKNOWN_TOKEN",
        )


def check_chat(chat: pb.Chat) -> None:
    """Raise InvalidArgument for a conversation without turns, or with an unknown role."""
    if not chat.messages:
        raise invalid("prompt.chat.messages", "there are none; give at least one", "EMPTY_PROMPT")
    for i, message in enumerate(chat.messages):
        if message.role not in ROLES:
            raise invalid(
                f"prompt.chat.messages[{i}].role",
                f"{quoted(message.role)} is unknown; use one of {', '.join(ROLES)}",
                "UNKNOWN_ROLE",
            )
    if not any(message.content.strip() for message in chat.messages):
        raise invalid("prompt.chat.messages", "all are empty; give some content", "EMPTY_PROMPT")
