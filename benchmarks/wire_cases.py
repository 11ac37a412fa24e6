"""The calls that ``fuzz_wire`` makes: which method, how, with which bytes and metadata.

A case depends on nothing but the seed and its number, so a wrong answer can be asked for again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from benchmarks import wire_keys
from benchmarks.rpcs import METHODS, methods_of, path_of
from benchmarks.wire_grammar import Grammar, Vocabulary, mutated
from mora_serve.v1 import adapters_pb2

NAMES = ("reverse", "uppercase", "double", "reverse", "uppercase", "spare", "nothing")
PROMPTS = ("reverse 'stone'", "write 'abc' in upper case", "x", "say 'a' nicely", "1 2 3 " * 20)
_SHORT = (0.001, 0.005, 0.02, 0.1)  # deadlines that pass
_HEX = ("", "", "", "", "ab" * 32, "z" * 64)
_GRPC_OWN = [*methods_of(health_pb2, reflection_pb2)]
_UPLOAD = METHODS["UploadAdapter"]
_CARD = adapters_pb2.DESCRIPTOR.message_types_by_name["RoutingCard"]


@dataclass(frozen=True)
class WireCase:
    """One call: ``streams`` are whether it is made as one of many requests, and of many answers.

    ``reads`` is after how many messages the client cancels, None for never. ``key`` is the kind of
    key that it has, empty on a server without keys.
    """

    path: str
    method: MethodDescriptor | None
    streams: tuple[bool, bool]
    messages: tuple[bytes, ...]
    metadata: tuple[tuple[str, str | bytes], ...]
    timeout: float
    reads: int | None
    compressed: bool
    key: str = ""

    @property
    def sent(self) -> bytes:
        """All that the server could know from the client."""
        words = [self.path, *(word for pair in self.metadata for word in pair)]
        texts = [w.encode() if isinstance(w, str) else w for w in words]
        return b"\n".join((*texts, *self.messages))

    @property
    def hurried(self) -> bool:
        """Whether its deadline may well pass."""
        return self.timeout in _SHORT

    @cached_property
    def as_declared(self) -> bool:
        """Whether it is made as its method is declared, one message where one is meant."""
        if self.method is None:
            return False
        declared = self.method.client_streaming, self.method.server_streaming
        return self.streams == declared and (declared[0] or len(self.messages) == 1)


class Cases:
    """Makes the case of a number; ``bundle`` has the adapters and routers to send and to spoil."""

    def __init__(self, bundle: Path, seed: int, patience: float) -> None:
        self.seed = seed
        self._patience = patience
        adapter = bundle / "adapters" / "reverse"
        self._config = (adapter / "adapter_config.json").read_bytes()
        self._weights = (adapter / "adapter_model.safetensors").read_bytes()
        self._routers = [p.read_bytes() for p in sorted((bundle / "router").iterdir())]
        self._vocabulary = Vocabulary(
            {
                **dict.fromkeys(("adapter", "name", "candidates", "tasks", "page_token"), NAMES),
                **dict.fromkeys(("text", "content", "prompts"), PROMPTS),
                **dict.fromkeys(("description", "group"), ("a", "")),
                **dict.fromkeys(("digest", "router_digest", "base_fingerprint"), _HEX),
                "path": ("reverse", "uppercase", "double", "router/router.safetensors", "link"),
                "role": ("system", "user", "assistant", "tool"),
                "ids": (1, 2, 3, 5, 40, 100),
                "stop_token_ids": (1, 2),
                "stop": ("\n", "a", "stone"),
                "weight": (1.0, 0.5, -1.0, 0.0),
                "max_tokens": (1, 1, 2, 3),
                "max_adapters": (0, 1, 2),
                "temperature": (0.0, 0.7, 1.0),
                **dict.fromkeys(("top_p", "min_p", "repetition_penalty"), (0.5, 0.9, 1.0)),
                **dict.fromkeys(("presence_penalty", "frequency_penalty"), (0.0, 0.5, -0.5)),
                **dict.fromkeys(("top_k", "logprobs"), (0, 1, 5)),
                "file": ("adapter_config.json", "adapter_model.safetensors", "routing_card.json"),
                "data": (self._config, self._weights[:5000], b"{}", b"RIFF"),
                "page_size": (0, 1, 2, 100),
                "cursor": ("", "0.0", "1.0", "1.ff", "fffffffffff.0", "1/2"),
                "seconds": (0, 1_800_000_000, -1, 253_402_300_799),
                "nanos": (0, 1, 999_999_999, -1),
                "service": ("", "mora_serve.v1.GenerationService"),
                "symbol": ("mora_serve.v1.GenerationService", "Generate"),
            },
            often=frozenset(("name", "path", "role", "content", "ids", "adapter", "tasks", "file")),
        )

    def case(self, number: int) -> WireCase:
        """The case of this number."""
        rng = random.Random(f"{self.seed}:{number}")
        # Each method in turn: none is left to chance.
        methods: Sequence[MethodDescriptor] = [*METHODS.values()]
        method: MethodDescriptor | None = methods[number % len(methods)]
        if rng.random() < 0.03:
            method = rng.choice(_GRPC_OWN)
        assert method is not None
        streams = declared = method.client_streaming, method.server_streaming
        messages = tuple(self._messages(method, rng))
        path = path_of(method)
        draw = rng.random()
        if draw < 0.02:
            path, method = _elsewhere(path, rng), None
        elif draw < 0.06:
            streams = rng.choice((True, False)), rng.choice((True, False))
            if streams[0] and not method.client_streaming:
                messages *= rng.randrange(3)  # none, or one too many
        elif draw < 0.08 and streams[0]:
            messages = ()
        if not streams[0]:
            messages = messages[:1] or (b"",)
        # A client that takes one answer where there are more waits to its deadline, and so does one
        # that watches.
        endless = (declared[1] and not streams[1]) or path == "/grpc.health.v1.Health/Watch"
        key, credentials = wire_keys.draw(rng, self.seed)
        return WireCase(
            path=path,
            method=method,
            streams=streams,
            messages=messages,
            metadata=(*_metadata(rng), *credentials),
            timeout=rng.choice(_SHORT) if endless or rng.random() < 0.02 else self._patience,
            reads=rng.randrange(3) if streams[1] and rng.random() < 0.1 else None,
            compressed=rng.random() < 0.05,
            key=key,
        )

    def _messages(self, method: MethodDescriptor, rng: random.Random) -> list[bytes]:
        if method.name == _UPLOAD.name and rng.random() < 0.5:
            return self._upload(rng)
        if method.name == "LoadRouter" and rng.random() < 0.05:
            return [self._router(rng)]
        count = rng.choice((1, 1, 2, 5)) if method.client_streaming else 1
        return [self._message(method, rng) for _ in range(count)]

    def _message(self, method: MethodDescriptor, rng: random.Random) -> bytes:
        draw = rng.random()
        if draw < 0.05:
            return rng.randbytes(rng.choice((0, 1, 2, 10, 100, 1000)))
        wildness = 0.0 if draw < 0.5 else rng.choice((0.0, 0.05, 0.2, 0.6))
        grammar = Grammar(self._vocabulary, rng, wildness)
        data = grammar.message(method.input_type).SerializeToString()
        if draw < 0.7:
            return data
        other = grammar.message(method.input_type).SerializeToString()
        return mutated(data, rng, other)

    def _upload(self, rng: random.Random) -> list[bytes]:
        """The messages of a whole upload, some of its files or of its messages spoilt."""
        config = json.loads(self._config)
        if rng.random() < 0.3:
            key = rng.choice([*config, "auto_map", "r", "alpha_pattern"])
            config[key] = rng.choice((None, 0, -1, 1e99, "x", [], {}, {"a": {"b": []}}, "a" * 999))
        files = {
            "adapter_config.json": json.dumps(config).encode(),
            "adapter_model.safetensors": self._weights,
        }
        for name in files:
            if rng.random() < 0.4:
                files[name] = mutated(files[name], rng)
        if rng.random() < 0.3:  # where most of what is read lies
            head = mutated(files["adapter_model.safetensors"][:2000], rng)
            files["adapter_model.safetensors"] = head + files["adapter_model.safetensors"][2000:]
        pb = adapters_pb2
        card = Grammar(self._vocabulary, rng, 0.05).message(_CARD)
        header = pb.UploadHeader(name=rng.choice(NAMES), replace=rng.random() < 0.8)
        if rng.random() < 0.5 and isinstance(card, pb.RoutingCard):
            header.card.CopyFrom(card)
        out = [pb.UploadAdapterRequest(header=header)]
        for name, data in files.items():
            half = rng.randrange(len(data) + 1)
            for part in (data[:half], data[half:]):
                chunk = pb.FileChunk(file=name, data=part)
                out.append(pb.UploadAdapterRequest(chunk=chunk))
        if rng.random() < 0.2:
            rng.shuffle(out)
        messages = [m.SerializeToString() for m in out]
        if rng.random() < 0.1:
            i = rng.randrange(len(messages))
            messages[i] = mutated(messages[i], rng)
        return messages

    def _router(self, rng: random.Random) -> bytes:
        """LoadRouter with a router's file, spoilt as a rule."""
        data = rng.choice(self._routers)
        if rng.random() < 0.8:
            head = mutated(data[:3000], rng)
            data = head + data[3000:]
        message = METHODS["LoadRouter"].input_type.fields_by_name["data"].number
        return bytes([message << 3 | 2]) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _elsewhere(path: str, rng: random.Random) -> str:
    """A path that no method has."""
    return rng.choice(
        (
            path + "x",
            path.lower(),
            "/a/b",
            "/" + "x" * 300,
            path.replace(".v1", ".v2"),
            "/x/%2e%2e",
        )
    )


def _metadata(rng: random.Random) -> tuple[tuple[str, str | bytes], ...]:
    """Tenant, request id and others: as they should be as a rule."""
    tenants = ("default", "A/../B", "", "fuzz ", "x" * 65, "{}", "fuzz,fuzz")
    out: list[tuple[str, str | bytes]] = []
    if rng.random() < 0.95:
        out.append(
            ("mora-tenant", rng.choice(tenants) if rng.random() < 0.04 else wire_keys.TENANT)
        )
    if rng.random() < 0.08:
        wild = ("job-7/a", "a" * 128, "a" * 129, "", " ", "%0a%0d", "a b", "../x", "{}", "x" * 3000)
        out.append(("mora-request-id", rng.choice(wild)))
    if rng.random() < 0.04:
        out += [(f"x-{i}", "v" * rng.randrange(50)) for i in range(rng.randrange(1, 40))]
    if rng.random() < 0.04:
        out.append((rng.choice(("x-bin", "mora-tenant-bin")), rng.randbytes(rng.randrange(300))))
    if rng.random() < 0.02:
        out += [out[0]] if out else [("mora-tenant", wire_keys.TENANT)] * 2
    if rng.random() < 0.01:
        out.append(("x-large", "v" * rng.choice((4000, 7000, 9000, 20_000))))
    return tuple(out)
