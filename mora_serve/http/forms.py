"""The objects that answers are made of: OpenAI's, and ``mora``, which tells of the adapters."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mora_serve.core import Decision, TokenOut, Usage
from mora_serve.http.tokens import TokenTexts

_LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's API says it so

Json = dict[str, Any]


class Form(Protocol):
    """How one kind of completion is written."""

    prefix: str  # of ids
    whole: str  # the name of the object
    chunk: str  # of one of a stream

    def choice(self, index: int, text: str, logprobs: Json | None, finish: str) -> Json:
        """A whole answer."""

    def first(self, index: int) -> Json:
        """What a stream begins with."""

    def delta(self, index: int, text: str, logprobs: Json | None) -> Json:
        """A piece of a stream."""

    def last(self, index: int, finish: str) -> Json:
        """How a stream says why it ends."""

    def logprobs(self, tokens: Sequence[TokenOut], texts: TokenTexts, offset: int) -> Json:
        """Log-probabilities of tokens, whose text begins ``offset`` characters into the answer."""


class ChatForm:
    """Chat completions."""

    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, logprobs: Json | None, finish: str) -> Json:
        """A whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": finish,
        }

    def first(self, index: int) -> Json:
        """The role."""
        return self._delta(index, {"role": "assistant", "content": ""})

    def delta(self, index: int, text: str, logprobs: Json | None) -> Json:
        """Some of the content."""
        return {**self._delta(index, {"content": text}), "logprobs": logprobs}

    def last(self, index: int, finish: str) -> Json:
        """No more content."""
        return {**self._delta(index, {}), "finish_reason": finish}

    def _delta(self, index: int, delta: Json) -> Json:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def logprobs(self, tokens: Sequence[TokenOut], texts: TokenTexts, offset: int) -> Json:
        """Tokens with their bytes and alternatives."""

        def one(token: int, logprob: float | None) -> Json:
            data = texts.bytes_of(token)
            return {
                "token": data.decode("utf-8", "replace"),
                "logprob": _finite(logprob),
                "bytes": list(data),
            }

        content = [
            {**one(t.id, t.logprob), "top_logprobs": [one(a.token, a.logprob) for a in t.top]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}


class CompletionForm:
    """Plain completions."""

    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"

    def choice(self, index: int, text: str, logprobs: Json | None, finish: str | None) -> Json:
        """A whole answer, or a piece of one."""
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def first(self, index: int) -> Json:
        """An empty piece."""
        return self.choice(index, "", None, None)

    def delta(self, index: int, text: str, logprobs: Json | None) -> Json:
        """Some of the text."""
        return self.choice(index, text, logprobs, None)

    def last(self, index: int, finish: str) -> Json:
        """No more text."""
        return self.choice(index, "", None, finish)

    def logprobs(self, tokens: Sequence[TokenOut], texts: TokenTexts, offset: int) -> Json:
        """Four lists, an element a token; the alternatives include the token itself."""
        names = [texts.text_of(t.id) for t in tokens]
        offsets = []
        for name in names:
            offsets.append(offset)
            offset += len(name)
        top = [
            {texts.text_of(a.token): _finite(a.logprob) for a in reversed(t.top)}
            | {name: _finite(t.logprob)}
            for t, name in zip(tokens, names, strict=True)
        ]
        return {
            "tokens": names,
            "token_logprobs": [_finite(t.logprob) for t in tokens],
            "top_logprobs": top,
            "text_offset": offsets,
        }


@dataclass(frozen=True)
class Envelope:
    """What every object of one answer says."""

    form: Form
    request_id: str
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Json], **more: Any) -> Json:
        """The object of a whole answer."""
        return self._object(self.form.whole, choices, more)

    def chunk(self, choices: Sequence[Json], **more: Any) -> Json:
        """The object of a piece of a stream."""
        return self._object(self.form.chunk, choices, more)

    def _object(self, name: str, choices: Sequence[Json], more: Json) -> Json:
        return {
            "id": f"{self.form.prefix}{self.request_id}",
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": list(choices),
            **more,
        }


def usage_object(usages: Iterable[Sequence[Usage]]) -> Json:
    """Counts of all answers, by prompt: a prompt counts once."""
    prompts = [answers for answers in usages if answers]
    prompt = sum(answers[0].prompt_tokens for answers in prompts)
    completion = sum(usage.completion_tokens for answers in prompts for usage in answers)
    cached = sum(answers[0].cached_tokens for answers in prompts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def decision_object(decision: Decision) -> Json:
    """Which adapters answer, who chose them, and what the router saw of the others.

    ``adapters`` has the form that a request's ``mora.adapters`` takes: sending it back keeps the
    choice.
    """
    return {
        "adapters": {
            a.adapter: {"weight": a.weight, "digest": a.digest} for a in decision.mixture.adapters
        },
        "source": decision.source.value,
        "candidates": [
            {"adapter": c.adapter, "score": c.score, "probability": c.probability}
            for c in decision.candidates
        ],
        "router_digest": decision.router_digest,
    }


def timings_object(usage: Usage) -> Json:
    """Where an answer's time went, in seconds since its request arrived."""
    return {
        "queue_seconds": usage.queue_seconds,
        "first_token_seconds": usage.first_token_seconds,
        "total_seconds": usage.total_seconds,
    }


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LEAST_LOGPROB)
