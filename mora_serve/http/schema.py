"""The bodies of requests: OpenAI's fields that are served, this server's own, and no others.

A field that is not served may be left at the value that means nothing (``tools: []``); with any
other it is refused by name. Sampling's ranges are checked where gRPC's are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mora_serve.http import errors

MAX_CHOICES = 16  # answers of one request, of all its prompts together
_MAX_KEYS = 128  # of an object that has a few
_MAX_TEXT = 20_000  # characters that somebody looks up on the map
_UINT32, _INT64 = 2**32 - 1, 2**63


class Body(BaseModel):
    """An object of which every key is known."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    # What is refused by name, each with the values that mean nothing, as null does.
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _of_known_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > _MAX_KEYS:
            raise PydanticCustomError("too_many_keys", "it has more keys than there are fields")
        found = data.keys() & cls.refused.keys()
        for key in sorted(found):
            value = data[key]
            if value is not None and not any(_same(value, n) for n in cls.refused[key]):
                raise PydanticCustomError(
                    "unsupported_parameter",
                    "this server does not support it; leave it out",
                    {"key": key},
                )
        return {key: value for key, value in data.items() if key not in found} if found else data


B = TypeVar("B", bound=Body)


def parsed(kind: type[B], data: bytes) -> B:
    """The body of a request. Raises InvalidArgument, about the first of its mistakes."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as e:
        raise errors.of_validation(e.errors(include_url=False, include_input=False)) from None


def _few(value: Any) -> Any:
    """Whatever is no object of very many keys, of which each could be a mistake to tell of."""
    if isinstance(value, dict) and len(value) > _MAX_KEYS:
        raise PydanticCustomError("too_many_keys", "it has more keys than there can be adapters")
    return value


def _same(value: Any, neutral: Any) -> bool:
    return type(value) is type(neutral) and bool(value == neutral)


Count = Annotated[int, Field(ge=0, le=_UINT32)]


def _one_or_more(value: Any) -> str:
    return errors.LIST if isinstance(value, list) else errors.ONE


def _one_or_object(value: Any) -> str:
    return errors.OBJECT if isinstance(value, dict) else errors.ONE


# What is wrong with one of several forms is told of the form that was meant.
Texts = Annotated[
    Annotated[str, Tag(errors.ONE)] | Annotated[list[str], Field(fail_fast=True), Tag(errors.LIST)],
    Discriminator(_one_or_more),
]


class AdapterWeight(Body):
    """One adapter of a mixture."""

    weight: float = 1.0
    digest: str = ""


Weight = Annotated[
    Annotated[AdapterWeight, Tag(errors.OBJECT)] | Annotated[float, Tag(errors.ONE)],
    Discriminator(_one_or_object),
]


class Mora(Body):
    """How ``model: "auto"`` chooses: a mixture, tasks, or what the router picks from."""

    adapters: Annotated[
        dict[str, Weight] | None,
        BeforeValidator(_few),
        Field(
            description="An explicit mixture, by the adapters' names: weights, or objects as the "
            "answer's `mora.adapters` has them."
        ),
    ] = None
    task: Annotated[
        list[str] | None, Field(fail_fast=True, description="Tasks; for each, one adapter runs.")
    ] = None
    fallback_to_router: bool = False
    candidates: Annotated[
        list[str] | None,
        Field(fail_fast=True, description="Adapters that the router may pick from."),
    ] = None
    max_adapters: Annotated[
        Count | None, Field(description="The most adapters that the router may mix.")
    ] = None
    route_by: Annotated[
        str | None,
        Field(description="The text to route by instead of the prompt, or of the last user turn."),
    ] = None


class StreamOptions(Body):
    """What a stream carries besides."""

    refused = {
        "include_obfuscation": (False,),
    }

    include_usage: bool = False


class Generation(Body):
    """What chat and plain completions share."""

    model: Annotated[
        str,
        Field(
            description="An adapter's name; `auto` for the router; `base`, or the base model's "
            "name, for no adapter."
        ),
    ]
    mora: Mora | None = None
    n: Annotated[int | None, Field(ge=1, le=MAX_CHOICES)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Annotated[int | None, Field(ge=-_INT64, lt=2 * _INT64)] = None
    stop: Texts | None = None
    user: Annotated[str | None, Field(description="Accepted and not used.")] = None
    # Of this server's engine, under the names that other servers of open models use.
    top_k: Count | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: Annotated[list[Count] | None, Field(fail_fast=True)] = None
    ignore_eos: bool | None = None


class TextPart(Body):
    """A part of a message."""

    refused = {
        "cache_control": (),
    }

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag(errors.ONE)]
    | Annotated[list[TextPart], Field(fail_fast=True), Tag(errors.LIST)],
    Discriminator(_one_or_more),
]


class Message(Body):
    """One turn of a conversation."""

    refused = {
        "name": (),
        "tool_calls": ([],),
        "tool_call_id": (),
        "function_call": (),
        "refusal": (),
        "audio": (),
        "annotations": ([],),
    }

    role: Annotated[
        str, Field(description="`system` (or `developer`), `user`, `assistant` or `tool`.")
    ]
    content: Content | None = None


class ChatCompletionRequest(Generation):
    """POST /v1/chat/completions."""

    refused = {
        "logit_bias": ({},),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none",),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "verbosity": (),
        "store": (False,),
        "metadata": ({},),
        "service_tier": ("auto", "default"),
        "web_search_options": (),
        "moderation": (),
        "safety_identifier": (),
        "prompt_cache_key": (),
        "prompt_cache_retention": (),
    }

    messages: Annotated[list[Message], Field(fail_fast=True)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None


class CompletionRequest(Generation):
    """POST /v1/completions."""

    refused = {
        "logit_bias": ({},),
        "best_of": (1,),
        "suffix": ("",),
    }

    prompt: Annotated[
        Any,
        Field(description="A text, token ids, or a list of texts or of lists of token ids."),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"type": "string"}},
                    {"type": "array", "items": {"type": "integer"}},
                    {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
                ]
            }
        ),
    ]
    max_tokens: Count | None = None
    echo: bool | None = None
    logprobs: Count | None = None


class MapRequest(Body):
    """POST /console/map."""

    text: Annotated[str, Field(max_length=_MAX_TEXT)] = ""
