"""Bad input for every RPC, and what has to come back: the one table that test and claim share.

A case is (fields of the request, code, part of the field's name, part of the remedy). The cases
are written for a server with two adapters, ``rev`` and ``sum``, whose tasks are ``do-rev`` and
``do-sum``, whose limits are ``LIMITS``, and whose adapter root ``spoil`` has prepared.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import safetensors.numpy
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from benchmarks.leaks import leaks
from benchmarks.rpcs import METHODS, path_of, raw
from mora_serve.client import Client, connection
from mora_serve.errors import MoraError
from mora_serve.v1 import adapters_pb2, generation_pb2

Case = tuple[dict[str, Any], str, str, str]

MESSAGE_BYTES = 1 << 20
LIMITS: dict[str, dict[str, Any]] = {
    "engine": {"max_context": 256, "max_tokens": 200, "max_batch": 16, "max_stop": 4},
    "adapters": {"max_adapters": 2},  # rev and sum fill the registry
    "server": {"max_message_bytes": MESSAGE_BYTES},
}
g, a = generation_pb2, adapters_pb2
LONG = "x" * 257
FIRST, SECOND = (f"selection.mixture.adapters[{i}]" for i in range(2))


def mixture(*weights: tuple[str, float] | str) -> dict[str, Any]:
    adapters = [
        g.AdapterWeight(adapter=w)
        if isinstance(w, str)
        else g.AdapterWeight(adapter=w[0], weight=w[1])
        for w in weights
    ]
    return {"selection": g.Selection(mixture=g.Mixture(adapters=adapters))}


def task(*tasks: str) -> dict[str, Any]:
    return {"selection": g.Selection(task=g.TaskHint(tasks=tasks))}


def auto(**fields: Any) -> dict[str, Any]:
    return {"selection": g.Selection(auto=g.AutoRoute(**fields))}


def chat(role: str, content: str) -> dict[str, Any]:
    message = g.ChatMessage(role=role, content=content)
    return {"prompt": g.Prompt(chat=g.Chat(messages=[message]))}


PROMPTED: dict[str, Case] = {
    "no prompt": ({"prompt": None}, "INVALID_ARGUMENT", "prompt", "give text"),
    "empty text": ({"prompt": g.Prompt(text="")}, "INVALID_ARGUMENT", "prompt.text", "give"),
    "no ids": (
        {"prompt": g.Prompt(token_ids=g.TokenIds())},
        *("INVALID_ARGUMENT", "prompt.token_ids", "give"),
    ),
    "unknown id": (
        {"prompt": g.Prompt(token_ids=g.TokenIds(ids=[1, 320]))},
        *("INVALID_ARGUMENT", "prompt.token_ids.ids[1]", "from 0 to 319"),
    ),
    "no turns": (
        {"prompt": g.Prompt(chat=g.Chat())},
        "INVALID_ARGUMENT",
        "prompt.chat.messages",
        "give",
    ),
    "unknown role": (
        chat("robot", "x"),
        "INVALID_ARGUMENT",
        "prompt.chat.messages[0].role",
        "use one of system",
    ),
    "empty turn": (chat("user", ""), "INVALID_ARGUMENT", "prompt.chat.messages", "give"),
    "far too many turns": (
        {"prompt": g.Prompt(chat=g.Chat(messages=[g.ChatMessage()] * 300))},
        *("INVALID_ARGUMENT", "prompt.chat.messages", "shorten"),
    ),
    "far too long a prompt": (
        {"prompt": g.Prompt(text="x" * 100_000)},
        *("INVALID_ARGUMENT", "prompt.text", "shorten"),
    ),
    "unknown adapter": (mixture("revv"), "NOT_FOUND", f"{FIRST}.adapter", "did you mean rev"),
    "unknown task": (
        task("do-revv"),
        "NOT_FOUND",
        "selection.task.tasks[0]",
        "did you mean do-rev",
    ),
    "no task": (task(), "INVALID_ARGUMENT", "selection.task.tasks", "name a task"),
    "too many tasks": (task(*"abcde"), "INVALID_ARGUMENT", "selection.task.tasks", "fewer"),
    "unknown candidate": (
        auto(candidates=["sun"]),
        "NOT_FOUND",
        "selection.auto.candidates[0]",
        "did you mean sum",
    ),
    "too many candidates": (
        auto(candidates=["rev"] * 101),
        *("INVALID_ARGUMENT", "selection.auto.candidates", "fewer"),
    ),
    "too many routed": (
        auto(max_adapters=5),
        "INVALID_ARGUMENT",
        "selection.auto.max_adapters",
        "between 0",
    ),
    "weight nan": (mixture(("rev", math.nan)), "INVALID_ARGUMENT", f"{FIRST}.weight", "finite"),
    "weight inf": (
        mixture("sum", ("rev", math.inf)),
        "INVALID_ARGUMENT",
        f"{SECOND}.weight",
        "finite",
    ),
    "adapter twice": (mixture("rev", "rev"), "INVALID_ARGUMENT", f"{SECOND}.adapter", "add"),
    "too many adapters": (
        mixture(*"abcde"),
        "INVALID_ARGUMENT",
        "selection.mixture.adapters",
        "fewer",
    ),
    "adapter without a name": (mixture(""), "NOT_FOUND", f"{FIRST}.adapter", "list"),
    "version that is not": (
        {
            "selection": g.Selection(
                mixture=g.Mixture(adapters=[g.AdapterWeight(adapter="rev", digest="ab" * 32)])
            )
        },
        *("NOT_FOUND", f"{FIRST}.digest", "use that"),
    ),
}


def sampling(remedy: str, at: str = "", **fields: Any) -> tuple[dict[str, Any], str, str, str]:
    (name,) = fields
    message = g.SamplingParams(**fields)
    return {"sampling": message}, "INVALID_ARGUMENT", f"sampling.{name}{at}", remedy


GENERATED: dict[str, Case] = PROMPTED | {
    "prompt too long": (
        {"prompt": g.Prompt(token_ids=g.TokenIds(ids=[5] * 256))},
        *("INVALID_ARGUMENT", "prompt", "shorten"),
    ),
    "max_tokens 0": sampling("from 1 to 200", max_tokens=0),
    "max_tokens too many": sampling("from 1 to 200", max_tokens=201),
    "temperature negative": sampling("from 0", temperature=-0.5),
    "temperature nan": sampling("from 0", temperature=math.nan),
    "top_p 0": sampling("above 0", top_p=0.0),
    "top_p above 1": sampling("to 1", top_p=1.01),
    "min_p above 1": sampling("to 1", min_p=1.01),
    "repetition_penalty 0": sampling("above 0", repetition_penalty=0.0),
    "presence_penalty 9": sampling("to 2", presence_penalty=9.0),
    "frequency_penalty -9": sampling("from -2", frequency_penalty=-9.0),
    "too many stops": sampling("at most 4", stop=list("abcde")),
    "empty stop": sampling("give some text", "[0]", stop=[""]),
    "long stop": sampling("at most 256", "[0]", stop=[LONG]),
    "unknown stop id": sampling("from 0 to 319", "[0]", stop_token_ids=[320]),
    "too many stop ids": sampling("at most 4", stop_token_ids=[1, 2, 3, 4, 5]),
    "too many logprobs": sampling("at most 20", logprobs=21),
}
BAD_NAME = {"name": "../x"}, "INVALID_ARGUMENT", "name", "lower-case"
NO_ADAPTER = {"name": "revv"}, "NOT_FOUND", "name", "did you mean rev"
CARDS = {
    "too many prompts": (a.RoutingCard(prompts=["x"] * 65), "prompts", "best 64"),
    "empty prompt": (a.RoutingCard(prompts=[" "]), "prompts", "give text"),
    "bad task": (a.RoutingCard(tasks=["Not A Task"]), "tasks", "lower-case"),
    "other base": (a.RoutingCard(base_fingerprint="abc"), "base_fingerprint", "its base"),
}


def paths(*bad: tuple[str, str, str, str]) -> dict[str, Any]:
    return {
        f"path {path!r}": ({"name": "new", "path": path}, code, field, remedy)
        for path, code, field, remedy in bad
    }


CASES: dict[str, dict[str, Case]] = {
    "Generate": GENERATED,
    "GenerateStream": GENERATED,
    "Route": PROMPTED,
    "RegisterAdapter": {
        "bad name": ({"name": "A B", "path": "rev"}, *BAD_NAME[1:]),
        "name in use": (
            {"name": "rev", "path": "sum"},
            *("ALREADY_EXISTS", "name", "set replace"),
        ),
        "one too many": (
            {"name": "new", "path": "rev"},
            *("RESOURCE_EXHAUSTED", "name", "unregister one"),
        ),
        **{
            f"card: {case}": (
                {"name": "new", "path": "rev", "card": card},
                *("INVALID_ARGUMENT", f"card.{field}", remedy),
            )
            for case, (card, field, remedy) in CARDS.items()
        },
        **paths(
            ("", "INVALID_ARGUMENT", "path", "relative"),
            ("..", "INVALID_ARGUMENT", "path", "relative"),
            ("../base", "INVALID_ARGUMENT", "path", "relative"),
            ("/etc", "INVALID_ARGUMENT", "path", "relative"),
            ("link", "INVALID_ARGUMENT", "path", "without links"),
            ("nowhere", "NOT_FOUND", "path", "relative"),
            ("pickle", "INVALID_ARGUMENT", "adapter_model.safetensors", "safe_serialization=True"),
            ("empty", "INVALID_ARGUMENT", "adapter_model.safetensors", "save_pretrained"),
            ("other-base", "INVALID_ARGUMENT", "adapter_model.safetensors", "this base needs"),
            ("infinite", "INVALID_ARGUMENT", "adapter_model.safetensors", "earlier checkpoint"),
            ("truncated", "INVALID_ARGUMENT", "adapter_model.safetensors", "copy it or save"),
            ("code", "INVALID_ARGUMENT", "adapter_config.json:'auto_map'", "remove it"),
            ("rank", "INVALID_ARGUMENT", "adapter_model.safetensors", "max_rank"),
        ),
    },
    "UploadAdapter": {
        "chunk first": ({"chunk": a.FileChunk()}, "INVALID_ARGUMENT", "kind", "header first"),
        "bad name": (
            {"header": a.UploadHeader(name="A B")},
            *("INVALID_ARGUMENT", "header.name", "lower-case"),
        ),
        **{
            f"card: {case}": (
                {"header": a.UploadHeader(name="new", card=card)},
                *("INVALID_ARGUMENT", f"header.card.{field}", remedy),
            )
            for case, (card, field, remedy) in CARDS.items()
        },
        "no files": (
            {"header": a.UploadHeader(name="new")},
            *("INVALID_ARGUMENT", "adapter_config.json", "save_pretrained"),
        ),
    },
    "UpdateAdapter": {
        "bad name": BAD_NAME,
        "unknown": ({"name": "revv", "card": a.RoutingCard()}, *NO_ADAPTER[1:]),
        "no card": ({"name": "rev"}, "INVALID_ARGUMENT", "card", "give"),
        **{
            case: ({"name": "rev", "card": card}, "INVALID_ARGUMENT", f"card.{field}", remedy)
            for case, (card, field, remedy) in CARDS.items()
        },
    },
    "UnregisterAdapter": {"bad name": BAD_NAME, "unknown": NO_ADAPTER},
    "GetAdapter": {"bad name": BAD_NAME, "unknown": NO_ADAPTER},
    "PinAdapter": {
        "bad name": BAD_NAME,
        "unknown": NO_ADAPTER,
        "unknown, pinned": ({"name": "revv", "pinned": True}, *NO_ADAPTER[1:]),
    },
    "ListAdapters": {
        "too large a page": ({"page_size": 201}, "INVALID_ARGUMENT", "page_size", "at most 200"),
        "bad token": ({"page_token": "A/B"}, "INVALID_ARGUMENT", "page_token", "next_page_token"),
    },
    "LoadRouter": {
        "nothing": ({}, "INVALID_ARGUMENT", "source", "give"),
        "no router": ({"data": b"x" * 100}, "INVALID_ARGUMENT", "router", "fit the router"),
        "outside": ({"path": "../x"}, "INVALID_ARGUMENT", "path", "under adapters.root"),
        "zero byte": ({"path": "a\0b"}, "INVALID_ARGUMENT", "path", "names no file"),
        "not regular": ({"path": "rev"}, "INVALID_ARGUMENT", "path", "put the file itself"),
        "not there": ({"path": "x"}, "NOT_FOUND", "path", "under adapters.root"),
    },
    "GetRouter": {},
    "ExportFeedback": {
        "bad cursor": ({"cursor": "1/2"}, "INVALID_ARGUMENT", "cursor", "of an earlier answer"),
        "a time that is none": (
            {"since": Timestamp(nanos=-1)},
            *("INVALID_ARGUMENT", "since", "give a protobuf Timestamp"),
        ),
        "feedback is off": ({}, "FAILED_PRECONDITION", "router.feedback", "set router.feedback"),
    },
    "GetServerInfo": {},
}


def spoil(adapters: Path, good: str) -> None:
    """Put directories that must not become adapters beside ``good``, a plain PEFT directory."""
    names = ("infinite", "truncated", "code", "rank", "other-base", "pickle")
    weights = {name: adapters / name / "adapter_model.safetensors" for name in names}
    for name in names:
        shutil.copytree(adapters / good, adapters / name)
    tensors = safetensors.numpy.load_file(weights["rank"])
    options = json.loads((adapters / good / "adapter_config.json").read_text())

    def change(name: str, **changes: Any) -> None:
        (adapters / name / "adapter_config.json").write_text(json.dumps(options | changes))

    def save(name: str, changed: dict[str, Any]) -> None:
        contiguous = {k: np.ascontiguousarray(v) for k, v in changed.items()}
        safetensors.numpy.save_file(contiguous, weights[name])

    first = next(iter(tensors))
    save("infinite", tensors | {first: np.full_like(tensors[first], np.inf)})
    save("other-base", {k: v[:, :-1] if "lora_A" in k else v for k, v in tensors.items()})
    times = 128 // options["r"]
    save("rank", {k: np.repeat(v, times, int("lora_B" in k)) for k, v in tensors.items()})
    change("rank", r=times * options["r"])
    change("code", auto_map={"x": "y.Z"})
    weights["truncated"].write_bytes(weights["truncated"].read_bytes()[:-100])
    weights["pickle"].rename(adapters / "pickle/adapter_model.bin")
    (adapters / "empty").mkdir()
    (adapters / "link").unlink(missing_ok=True)
    (adapters / "link").symlink_to(adapters / good)


def request_of(method: MethodDescriptor, fields: dict[str, Any]) -> Message:
    """A request of the method's kind, with a prompt where it takes one; None leaves a field out."""
    kind = message_factory.GetMessageClass(method.input_type)
    good = {"prompt": g.Prompt(text="hello")}
    prompt = good if "prompt" in method.input_type.fields_by_name else {}
    return kind(**{k: v for k, v in (prompt | fields).items() if v is not None})


def failure(
    client: Client, method: MethodDescriptor, request: Message | bytes, **options: Any
) -> MoraError | None:
    """Make a call of any kind to its end: what it fails with, None when it does not."""
    streams = method.client_streaming, method.server_streaming
    make = raw(client.channel, path_of(method), streams)
    data = request if isinstance(request, bytes) else request.SerializeToString()
    try:
        answer = make(iter([data]) if streams[0] else data, timeout=20, **options)
        if streams[1]:
            list(answer)
    except grpc.RpcError as e:
        return connection.error_of(e, client.address)
    return None


def wrong(client: Client, rpc: str, case: str, root: Path) -> list[str]:
    """What is not as it should be about the answer to a case and the good request after it.

    Nothing under ``root`` may be named in a message.
    """
    fields, code, field, remedy = CASES[rpc][case]
    request = request_of(METHODS[rpc], fields)
    error = failure(client, METHODS[rpc], request)
    if error is None:
        return ["was accepted"]
    message = str(error)
    told = leaks(message, request.SerializeToString(), [str(root)])
    found = {
        f"code {error.code}, not {code}: {message}": error.code != code,
        f"field {error.field!r}, not {field!r}": error.field != field,
        f"names no {field!r}: {message}": re.split("[.:]", field)[-1] not in message,
        f"gives no remedy {remedy!r}: {message}": remedy not in message,
        f"reason {error.reason!r}": not error.reason.isupper(),
        f"gives away {told}: {message}": bool(told),
        "the next request fails": not works(client),
        "the adapters are others": {x.name for x in client.list_adapters()} != {"rev", "sum"},
    }
    return [text for text, is_wrong in found.items() if is_wrong]


def works(client: Client) -> bool:
    """Is a good request served?"""
    got = client.generate("hello", adapters={"rev": 1.0}, max_tokens=1)
    return got.usage.completion_tokens == 1
