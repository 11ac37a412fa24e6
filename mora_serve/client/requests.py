"""What a client asks for: keyword arguments -> the API's messages. No connection here."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from mora_serve.client.arguments import filled, invalid
from mora_serve.core import Mixture
from mora_serve.errors import InvalidArgument
from mora_serve.v1 import adapters_pb2, generation_pb2, router_pb2

UPLOAD_FILES = ("adapter_config.json", "adapter_model.safetensors", "routing_card.json")
CHUNK_BYTES = 1 << 20


class CallOptions(TypedDict, total=False):
    """Options of every call: ``timeout`` in seconds, ``request_id`` for the server's log."""

    timeout: float | None
    request_id: str


class RouteOptions(CallOptions, total=False):
    """What to answer and who answers; of ``adapters``, ``task`` and ``base`` at most one.

    A prompt is a text (positional), ``messages`` (role, content) or ``token_ids``. ``adapters``
    maps names to weights; a Mixture keeps the versions of an earlier decision. Without any
    choice the router picks, by ``route_by`` when given, from ``candidates`` when given, and mixes
    at most ``max_adapters``. Where several texts can be given, one needs no list.
    """

    messages: Sequence[tuple[str, str]]
    token_ids: Sequence[int]
    adapters: Mapping[str, float] | Mixture | None
    task: str | Sequence[str]
    fallback_to_router: bool
    base: bool
    route_by: str
    candidates: str | Sequence[str]
    max_adapters: int


class GenerateOptions(RouteOptions, total=False):
    """How to sample, as in ``core.SamplingParams``; without a seed the server draws one."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int


class CardOptions(CallOptions, total=False):
    """When the router picks an adapter; see the API's RoutingCard."""

    prompts: str | Sequence[str]
    tasks: str | Sequence[str]
    description: str
    group: str
    base_fingerprint: str
    router_digest: str


_SAMPLING = frozenset(GenerateOptions.__annotations__) - frozenset(RouteOptions.__annotations__)
_CARD = frozenset(CardOptions.__annotations__) - frozenset(CallOptions.__annotations__)

G = TypeVar("G", generation_pb2.GenerateRequest, generation_pb2.GenerateStreamRequest)


def generate(kind: type[G], prompt: str | None, options: GenerateOptions) -> G:
    """A request of Generate or GenerateStream.

    Raises InvalidArgument for more than one prompt, more than one choice of adapters, or a value
    that the message cannot hold.
    """
    given: dict[str, Any] = {k: v for k, v in options.items() if k in _SAMPLING}
    sampling = filled(generation_pb2.SamplingParams, "sampling", **given)
    return kind(prompt=_prompt(prompt, options), selection=_selection(options), sampling=sampling)


def route(prompt: str | None, options: RouteOptions) -> router_pb2.RouteRequest:
    """A request of Route; raises as ``generate`` does."""
    return router_pb2.RouteRequest(prompt=_prompt(prompt, options), selection=_selection(options))


def card(options: CardOptions) -> adapters_pb2.RoutingCard | None:
    """A routing card, or None when nothing is said.

    Raises InvalidArgument for a value that the message cannot hold, as all that follow do.
    """
    given: dict[str, Any] = {k: v for k, v in options.items() if k in _CARD and v}
    return filled(adapters_pb2.RoutingCard, "card", **given) if given else None


def register(
    name: str, path: str, replace: bool, options: CardOptions, sha256: str = ""
) -> adapters_pb2.RegisterAdapterRequest:
    """A request of RegisterAdapter."""
    kind, new = adapters_pb2.RegisterAdapterRequest, card(options)
    return filled(kind, "", name=name, path=path, card=new, replace=replace, sha256=sha256)


def update(name: str, options: CardOptions) -> adapters_pb2.UpdateAdapterRequest:
    """A request of UpdateAdapter: the whole new card."""
    new = card(options) or adapters_pb2.RoutingCard()
    return filled(adapters_pb2.UpdateAdapterRequest, "", name=name, card=new)


def load_router(path: str | None, data: bytes | None) -> router_pb2.LoadRouterRequest:
    """A request of LoadRouter. Raises InvalidArgument unless exactly one source is given."""
    if (path is None) == (data is None):
        raise InvalidArgument("source: give a path or data, not both", field="source")
    if path is not None:
        return filled(router_pb2.LoadRouterRequest, "", path=path)
    return router_pb2.LoadRouterRequest(data=data)


def export_feedback(cursor: str, since: datetime | None) -> router_pb2.ExportFeedbackRequest:
    """A request of ExportFeedback; a time without a zone is one of UTC."""
    return filled(router_pb2.ExportFeedbackRequest, "", cursor=cursor, since=since)


def upload(
    name: str, directory: Path, replace: bool, options: CardOptions
) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    """The messages of an upload: the header, then the files in pieces of 1 MiB.

    The header states their SHA-256, so that files that change on the way are refused.
    Raises InvalidArgument when the directory holds no adapter.
    """
    files = [directory / file for file in UPLOAD_FILES if (directory / file).is_file()]
    for file in UPLOAD_FILES[:2]:
        if directory / file not in files:
            raise _absent(file, directory)
    kind, new = adapters_pb2.UploadHeader, card(options)
    return _upload(filled(kind, "header", name=name, card=new, replace=replace), files)


def _absent(file: str, directory: Path) -> InvalidArgument:
    """Why a directory holds no such file of an adapter."""
    from mora_serve.adapters import absent

    try:
        opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as e:
        return InvalidArgument(
            f"directory: it cannot be opened ({e.strerror}); give a PEFT adapter's directory",
            field="directory",
        )
    try:
        error = absent.missing(file, opened)
    finally:
        os.close(opened)
    return InvalidArgument(f"directory: {error.message}", field="directory", reason=error.reason)


def _upload(
    header: adapters_pb2.UploadHeader, files: Sequence[Path]
) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                digest.update(data)
    header.sha256 = digest.hexdigest()
    yield adapters_pb2.UploadAdapterRequest(header=header)
    for path in files:
        with path.open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                chunk = adapters_pb2.FileChunk(file=path.name, data=data)
                yield adapters_pb2.UploadAdapterRequest(chunk=chunk)


def _prompt(text: str | None, options: RouteOptions) -> generation_pb2.Prompt:
    messages, ids = options.get("messages"), options.get("token_ids")
    if sum(x is not None for x in (text, messages, ids)) != 1:
        raise InvalidArgument(
            "prompt: give exactly one of a text, messages and token_ids", field="prompt"
        )
    kind = generation_pb2.Prompt
    if messages is not None:
        turns = [_turn(i, turn) for i, turn in enumerate(messages)]
        return kind(chat=generation_pb2.Chat(messages=turns))
    if ids is not None:
        return kind(token_ids=filled(generation_pb2.TokenIds, "prompt.token_ids", ids=ids))
    return filled(kind, "prompt", text=text)


def _turn(i: int, turn: tuple[str, str]) -> generation_pb2.ChatMessage:
    at = f"prompt.chat.messages[{i}]"
    try:
        role, content = turn
    except (TypeError, ValueError):
        raise invalid(at, turn, "a role and its content, e.g. ('user', 'Hello')") from None
    return filled(generation_pb2.ChatMessage, at, role=role, content=content)


def _selection(options: RouteOptions) -> generation_pb2.Selection | None:
    adapters, base = options.get("adapters"), bool(options.get("base"))
    tasks = options.get("task")
    auto = filled(
        generation_pb2.AutoRoute,
        "selection.auto",
        text=options.get("route_by"),
        candidates=options.get("candidates"),
        max_adapters=options.get("max_adapters"),
    )
    routed = auto != generation_pb2.AutoRoute()
    if sum((adapters is not None, bool(tasks), base, routed)) > 1:
        raise InvalidArgument(
            "selection: adapters, task, base and the router's options exclude each other; "
            "give one of them",
            field="selection",
        )
    if adapters is not None:
        return generation_pb2.Selection(mixture=_mixture(adapters))
    if tasks:
        fallback = options.get("fallback_to_router")
        hint = filled(
            generation_pb2.TaskHint, "selection.task", tasks=tasks, fallback_to_router=fallback
        )
        return generation_pb2.Selection(task=hint)
    if base:
        return generation_pb2.Selection(base=generation_pb2.BaseOnly())
    return generation_pb2.Selection(auto=auto) if routed else None


def _mixture(adapters: Mapping[str, float] | Mixture) -> generation_pb2.Mixture:
    if isinstance(adapters, Mixture):
        entries = [(a.adapter, a.weight, a.digest) for a in adapters.adapters]
    elif isinstance(adapters, Mapping):
        entries = [(name, weight, "") for name, weight in adapters.items()]
    else:
        raise invalid("selection.mixture", adapters, "names and weights, e.g. {'reverse': 1.0}")
    weights = [
        filled(
            generation_pb2.AdapterWeight,
            f"selection.mixture.adapters[{i}]",
            adapter=adapter,
            weight=weight,
            digest=digest,
        )
        for i, (adapter, weight, digest) in enumerate(entries)
    ]
    return generation_pb2.Mixture(adapters=weights)
