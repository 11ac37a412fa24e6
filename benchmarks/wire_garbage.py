"""Connections that speak HTTP/2 badly, or not at all: what no grpc client would send."""

from __future__ import annotations

import contextlib
import random
import socket

from benchmarks.wire_grammar import mutated

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _WINDOW, _CONTINUATION = 0, 1, 3, 4, 6, 8, 9
_END_STREAM, _END_HEADERS = 1, 4
_PATHS = (
    *(b"/mora_serve.v1.ServerService/GetServerInfo", b"/mora_serve.v1.GenerationService/Generate"),
    *(b"/mora_serve.v1.AdapterService/UploadAdapter", b"/grpc.health.v1.Health/Check"),
    *(b"", b"/", b"no/slash", b"/\xff\xfe/\x80", b"/" + b"x" * 4000),
)
_VALUES = (
    *(b"fuzz", b"\xff\xfe", b"", b"a\x00b", b"\xc3\x28", b"v" * 9000, b"a\r\nb: c", "é".encode()),
)
_NAMES = (b"mora-tenant", b"mora-request-id", b"authorization", b"x-bin", b"UPPER", b"", b"a b")
_TIMEOUTS = (b"1S", b"", b"x", b"-1S", b"99999999H", b"999999999H", b"1n")
_SPOKEN = (
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200,
    b"\0" * 100,
    b"PRI * HTTP/2.0\r\n",
    b"",
)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame."""
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
    return head + payload


def garbage(rng: random.Random) -> bytes:
    """All that a client says on one connection."""
    draw = rng.random()
    if draw < 0.15:
        return rng.choice((*_SPOKEN, rng.randbytes(rng.randrange(2000))))
    spoken = frame(_SETTINGS, 0, 0, b"") + b"".join(
        _call(2 * i + 1, rng) for i in range(rng.choice((1, 1, 3, 20)))
    )
    if draw < 0.4:
        spoken = mutated(spoken, rng)
    elif draw < 0.6:
        spoken += b"".join(_control(rng) for _ in range(rng.choice((1, 10, 300))))
    return PREFACE + spoken


def strike(address: str, data: bytes, seconds: float = 0.5) -> bytes:
    """Say it, and return what the server says until it is silent so long, then hang up."""
    host, _, port = address.rpartition(":")
    heard = b""
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), seconds) as s:
        s.sendall(data)
        while len(heard) < 1 << 20 and (part := s.recv(65536)):
            heard += part
    return heard


def _call(stream: int, rng: random.Random) -> bytes:
    fields = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", rng.choice(_PATHS)),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    ]
    if rng.random() < 0.5:
        fields.append((b"grpc-timeout", rng.choice(_TIMEOUTS)))
    if rng.random() < 0.2:
        fields.append((b"grpc-encoding", rng.choice((b"gzip", b"br", b"identity", b"\xff"))))
    fields += [(rng.choice(_NAMES), rng.choice(_VALUES)) for _ in range(rng.randrange(4))]
    if rng.random() < 0.1:
        fields.pop(rng.randrange(len(fields)))
    block = b"".join(b"\0" + _text(name) + _text(value) for name, value in fields)
    flags = _END_HEADERS if rng.random() < 0.9 else 0
    out = frame(_HEADERS, flags, stream, block)
    if not flags:
        out += frame(_CONTINUATION, _END_HEADERS if rng.random() < 0.8 else 0, stream, b"")
    body = rng.choice((b"", b"\x08\x01", b"\xff" * 20))
    size = len(body) if rng.random() < 0.7 else rng.choice((0, 1, 1 << 31, (1 << 32) - 1))
    message = bytes([rng.choice((0, 0, 0, 1, 7))]) + size.to_bytes(4, "big") + body
    end = _END_STREAM if rng.random() < 0.8 else 0
    out += frame(_DATA, end, stream, message)
    if rng.random() < 0.2:
        out += frame(_RESET, 0, stream, b"\0\0\0\x08")
    return out


def _control(rng: random.Random) -> bytes:
    return rng.choice(
        (
            frame(_PING, 0, 0, b"12345678"),
            frame(_PING, 0, 0, b"123"),
            frame(_WINDOW, 0, 0, b"\0\0\0\0"),
            frame(_WINDOW, 0, 1, b"\x7f\xff\xff\xff"),
            frame(_SETTINGS, 0, 0, b"\0\x04\xff\xff\xff\xff"),
            frame(_SETTINGS, 0, 0, b"\0\x04\0\0\0\0"),
            frame(_RESET, 0, 99, b"\0\0\0\0"),
            frame(rng.randrange(256), rng.randrange(256), rng.randrange(9), rng.randbytes(9)),
        )
    )


def _text(value: bytes) -> bytes:
    """A string of HPACK, as it is."""
    if len(value) < 127:
        return bytes([len(value)]) + value
    rest, out = len(value) - 127, bytearray([127])
    while rest > 127:
        out.append(rest & 127 | 128)
        rest >>= 7
    return bytes([*out, rest]) + value
