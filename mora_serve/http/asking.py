"""From a body to what the server answers: prompts, the selection of adapters, sampling.

Errors come back under the names that the body has for what they are about.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mora_serve.errors import InvalidArgument, MoraError
from mora_serve.http.schema import (
    MAX_CHOICES,
    AdapterWeight,
    ChatCompletionRequest,
    CompletionRequest,
    Generation,
    Message,
    Mora,
)
from mora_serve.server.answers import Asked
from mora_serve.server.convert import invalid
from mora_serve.v1 import generation_pb2 as pb

AUTO, BASE = "auto", "base"
TIMEOUT = "x-request-timeout"
COMPLETION_TOKENS = 16  # of a plain completion that does not say, as OpenAI's
_MOST_SECONDS = 24 * 3600.0

_SAMPLING = (
    *("temperature", "top_p", "presence_penalty", "frequency_penalty"),
    *("top_k", "min_p", "repetition_penalty", "ignore_eos"),
)


@dataclass(frozen=True)
class Question:
    """A body, read: what is asked for each of its prompts, and under which names."""

    asked: tuple[Asked, ...]
    names: Mapping[str, str]  # a field of the API's messages -> its name in the body
    echo: tuple[str, ...] = ()  # what stands before the answers, by prompt


@contextmanager
def named(question_names: Mapping[str, str]) -> Iterator[None]:
    """Errors are about the body's fields."""
    try:
        yield
    except MoraError as e:
        field = _named(e.field, question_names)
        raise (e if field == e.field else e.at(field)) from None


def _named(field: str, names: Mapping[str, str]) -> str:
    for prefix, name in names.items():
        if field == prefix or field.startswith((f"{prefix}[", f"{prefix}.")):
            rest = field[len(prefix) :]
            return (name + rest).lstrip(".") if name else rest.lstrip(".")
    return field


def chat(body: ChatCompletionRequest, base: str, most_tokens: int, timeout: str) -> Question:
    """What a chat asks. Raises InvalidArgument."""
    prompt = pb.Prompt(chat=pb.Chat(messages=[_turn(m, i) for i, m in enumerate(body.messages)]))
    selection, names = _selection(body, base)
    sampling = _sampling(body)
    limit = body.max_completion_tokens
    if limit is not None and body.max_tokens not in (None, limit):
        raise invalid("max_tokens", "it contradicts max_completion_tokens; give one of them")
    limit = body.max_tokens if limit is None else limit
    sampling.max_tokens = most_tokens if limit is None else limit
    if body.logprobs:
        sampling.logprobs = body.top_logprobs or 0
    elif body.top_logprobs is not None:
        raise invalid("top_logprobs", "it needs logprobs; set logprobs to true")
    asked = Asked(prompt, selection, sampling, _deadline(timeout), body.n or 1)
    token_limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return Question(
        (asked,),
        {
            "prompt.chat.messages": "messages",
            "prompt.chat": "messages",
            "prompt": "messages",
            "sampling.max_tokens": token_limit,
            "sampling.logprobs": "top_logprobs",
            "sampling": "",
            **names,
        },
    )


def completion(body: CompletionRequest, base: str, most_tokens: int, timeout: str) -> Question:
    """What a plain completion asks. Raises InvalidArgument."""
    prompts = _prompts(body.prompt)
    count = body.n or 1
    if len(prompts) * count > MAX_CHOICES:
        raise invalid(
            "prompt",
            f"{len(prompts)} prompts with {count} answers each are too many; ask for at most "
            f"{MAX_CHOICES} answers in all",
        )
    selection, names = _selection(body, base)
    sampling = _sampling(body)
    default = min(COMPLETION_TOKENS, most_tokens)
    sampling.max_tokens = default if body.max_tokens is None else body.max_tokens
    if body.logprobs is not None:
        sampling.logprobs = body.logprobs
    if body.echo and body.logprobs is not None:
        raise invalid(
            "echo",
            "this server has no log-probabilities of prompts; leave out echo or logprobs",
            "UNSUPPORTED_PARAMETER",
        )
    deadline = _deadline(timeout)
    asked = tuple(Asked(p, selection, sampling, deadline, count) for p in prompts)
    own = ("prompt.text", "prompt.token_ids.ids", "prompt.token_ids")
    names = {**dict.fromkeys(own, "prompt"), "sampling": "", **names}
    return Question(asked, names)


def _turn(message: Message, i: int) -> pb.ChatMessage:
    role = "system" if message.role == "developer" else message.role
    content = message.content
    if content is None:
        if message.role != "assistant":
            raise invalid(f"messages[{i}].content", "it is missing; give some text")
        content = ""
    if not isinstance(content, str):
        content = "".join(part.text for part in content)
    return pb.ChatMessage(role=role, content=content)


def _prompts(value: Any) -> list[pb.Prompt]:
    """The prompts of a plain completion, in whichever form."""
    if isinstance(value, str):
        return [pb.Prompt(text=value)]
    if not isinstance(value, list):
        raise invalid("prompt", "it is neither a text nor a list; give a text or token ids")
    if not value:
        raise invalid("prompt", "it is empty; give some text", "EMPTY_PROMPT")
    if isinstance(value[0], int):
        return [_ids(value, "prompt")]
    if len(value) > MAX_CHOICES:
        raise invalid("prompt", f"{len(value)} prompts are too many; send at most {MAX_CHOICES}")
    return [
        pb.Prompt(text=part) if isinstance(part, str) else _ids(part, f"prompt[{i}]")
        for i, part in enumerate(value)
    ]


def _ids(value: Any, field: str) -> pb.Prompt:
    fits = isinstance(value, list) and all(type(t) is int and 0 <= t < 2**32 for t in value)
    if not fits:
        raise invalid(field, "it is neither a text nor a list of token ids; give one of them")
    return pb.Prompt(token_ids=pb.TokenIds(ids=value))


def _sampling(body: Generation) -> pb.SamplingParams:
    """Sampling as OpenAI's API means it: at temperature 1 where nothing is said."""
    values = {name: v for name in _SAMPLING if (v := getattr(body, name)) is not None}
    message = pb.SamplingParams(**{"temperature": 1.0, **values})
    # One that is drawn is told, and JavaScript's numbers have 53 bits.
    message.seed = secrets.randbits(53) if body.seed is None else body.seed % 2**64
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    message.stop.extend(stops)
    message.stop_token_ids.extend(body.stop_token_ids or ())
    return message


def _selection(body: Generation, base: str) -> tuple[pb.Selection, dict[str, str]]:
    """The selection of adapters, and what the body calls its fields."""
    model, mora = body.model, body.mora or Mora()
    ways = [name for name in ("adapters", "task") if getattr(mora, name) is not None]
    router = [n for n in ("candidates", "max_adapters", "route_by") if getattr(mora, n) is not None]
    given = ways + router
    if model != AUTO and given:
        raise invalid(
            f"mora.{given[0]}",
            f"it says how {AUTO!r} chooses, and model names {model[:64]!r}; give model {AUTO!r}, "
            "or leave it out",
        )
    if ways and len(given) > 1:
        raise invalid(f"mora.{given[1]}", f"it does not go with mora.{ways[0]}; give one of them")
    if mora.fallback_to_router and mora.task is None:
        raise invalid("mora.fallback_to_router", "it goes with mora.task; leave it out")
    names = {
        "selection.task.tasks": "mora.task",
        "selection.auto.text": "mora.route_by",
        "selection.auto": "mora",
        "selection.mixture.adapters": "mora.adapters",
    }
    if model in (BASE, base) and model != AUTO:
        return pb.Selection(base=pb.BaseOnly()), names
    if model != AUTO:
        weight = pb.AdapterWeight(adapter=model)
        mixture = pb.Mixture(adapters=[weight])
        names = {"selection.mixture.adapters[0].adapter": "model", "selection": "model"}
        return pb.Selection(mixture=mixture), names
    if mora.adapters is not None:
        weights = [_weight(name, value) for name, value in mora.adapters.items()]
        own = {
            f"selection.mixture.adapters[{i}]{part}": f"mora.adapters.{_shown(name)}{to}"
            for i, name in enumerate(mora.adapters)
            for part, to in ((".adapter", ""), ("", ""))
        }
        return pb.Selection(mixture=pb.Mixture(adapters=weights)), {**own, **names}
    if mora.task is not None:
        hint = pb.TaskHint(tasks=mora.task, fallback_to_router=mora.fallback_to_router)
        return pb.Selection(task=hint), names
    auto = pb.AutoRoute(
        text=mora.route_by or "",
        candidates=mora.candidates or (),
        max_adapters=mora.max_adapters or 0,
    )
    return pb.Selection(auto=auto), names


def _weight(name: str, value: AdapterWeight | float) -> pb.AdapterWeight:
    if not isinstance(value, AdapterWeight):
        return pb.AdapterWeight(adapter=name, weight=value)
    return pb.AdapterWeight(adapter=name, weight=value.weight, digest=value.digest)


def _shown(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) else "…"


def _deadline(timeout: str) -> float | None:
    """When the answer is to be complete, by the header; None where it does not say."""
    if not timeout:
        return None
    try:
        seconds = float(timeout)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= _MOST_SECONDS:
        raise InvalidArgument(
            f"{TIMEOUT}: it is no number of seconds up to {_MOST_SECONDS:g}; give one, or leave it "
            "out",
            field=TIMEOUT,
        )
    return time.monotonic() + seconds
