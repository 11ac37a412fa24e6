"""The calls of this server's own API over HTTP: protobuf's JSON in, protobuf's JSON out.

``POST /mora_serve.v1.AdapterService/ListAdapters`` with ``{}`` is the gRPC call of this name: the
same method, roles, limits, metrics and audit. Fields have the names of the .proto files. An
upload is a form: a part ``header`` (JSON of an UploadHeader), then the files, each a part whose
file name is the file's.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mora_serve.errors import InvalidArgument
from mora_serve.http.aside import Aside
from mora_serve.server.convert import invalid
from mora_serve.server.services import Services
from mora_serve.v1 import adapters_pb2, router_pb2, server_pb2

UPLOAD = "/mora_serve.v1.AdapterService/UploadAdapter"
_MODULES = (adapters_pb2, router_pb2, server_pb2)
_DEPTH = 32  # of nested objects
_SHORT = 8 << 10  # bytes of JSON that are read on the event loop: some milliseconds
_HEADER_BYTES = 1 << 20  # of the upload's header, example prompts included
_PART_BYTES = 4096  # of the headers of a part

Endpoint = Callable[[Request], Any]
_Part = bytes | adapters_pb2.FileChunk  # the JSON of a header, or some of a file


def endpoints(
    services: Callable[[], Services], reading: Aside
) -> Iterator[tuple[str, str, Endpoint]]:
    """Path, summary and endpoint of each call with one request and one answer, and of uploads.

    ``reading`` is where large JSON is read.
    """
    for module in _MODULES:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                path = f"/{service.full_name}/{method.name}"
                if path == UPLOAD:
                    yield path, "UploadAdapter, as a form", _upload(services, reading)
                elif not (method.client_streaming or method.server_streaming):
                    read = partial(_read, reading, GetMessageClass(method.input_type), "body")
                    yield path, method.name, _unary(services, service.full_name, method.name, read)


def _unary(
    services: Callable[[], Services],
    service: str,
    method: str,
    read: Callable[[bytes], Awaitable[Message]],
) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        message = await read(await request.body() or b"{}")
        handle = getattr(services().servicers[service], method)
        return _answer(await handle(message, None))

    return endpoint


def _upload(services: Callable[[], Services], reading: Aside) -> Endpoint:
    header = partial(_read, reading, adapters_pb2.UploadHeader, "header")

    async def endpoint(request: Request) -> Response:
        handle = services().servicers["mora_serve.v1.AdapterService"].UploadAdapter
        return _answer(await handle(_parts(request, header), None))

    return endpoint


def _answer(message: Message) -> Response:
    return JSONResponse(
        json_format.MessageToDict(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
    )


async def _read(reading: Aside, kind: type[Any], field: str, data: bytes) -> Any:
    """The message that JSON says. Raises InvalidArgument, about ``field``."""
    parse = partial(_parsed, data, kind(), field)
    return parse() if len(data) <= _SHORT else await reading.run(parse)


def _parsed(data: bytes, message: Any, field: str) -> Any:
    try:
        if not isinstance(given := json.loads(data), dict):
            raise ValueError("no object")
        json_format.ParseDict(given, message, max_recursion_depth=_DEPTH)
    except (json_format.ParseError, ValueError, RecursionError, TypeError, AttributeError):
        raise InvalidArgument(
            f"{field}: it is no JSON of a {message.DESCRIPTOR.name}; see the .proto files",
            field=field,
            reason="INVALID_JSON",
        ) from None
    return message


async def _parts(
    request: Request, header: Callable[[bytes], Awaitable[Any]]
) -> AsyncIterator[adapters_pb2.UploadAdapterRequest]:
    """The messages of an upload, as its form comes in."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 70:
        raise InvalidArgument(
            "content-type: an upload is a form; send multipart/form-data",
            field="content-type",
            reason="NOT_A_FORM",
        )
    form = _Form(boundary)

    async def message(part: _Part) -> adapters_pb2.UploadAdapterRequest:
        if isinstance(part, bytes):
            return adapters_pb2.UploadAdapterRequest(header=await header(part))
        return adapters_pb2.UploadAdapterRequest(chunk=part)

    async for data in request.stream():
        for part in form.feed(data):
            yield await message(part)
    for part in form.end():
        yield await message(part)


class _Form:
    """A form's parts as they come: nothing but the header and one piece is kept."""

    def __init__(self, boundary: bytes) -> None:
        self._out: list[_Part] = []
        self._size = 0
        self._name = self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._file: str | None = None
        self._header = bytearray()
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_name,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header,
                "on_headers_finished": self._on_headers,
                "on_part_data": self._on_data,
                "on_part_end": self._on_end,
            },
        )

    def feed(self, data: bytes) -> list[_Part]:
        """What is complete with some more bytes."""
        try:
            self._parser.write(data)
        except FormParserError:
            raise invalid("body", "it is not a whole form; send multipart/form-data") from None
        out, self._out = self._out, []
        return out

    def end(self) -> list[_Part]:
        """What is left. Raises InvalidArgument for a form that breaks off."""
        try:
            self._parser.finalize()
        except FormParserError:
            raise invalid("body", "the form breaks off; send it to its end") from None
        return self._out

    def _begin(self) -> None:
        self._headers, self._size = {}, 0
        self._name = self._value = b""

    def _on_name(self, data: bytes, start: int, end: int) -> None:
        self._name += self._counted(data[start:end])

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += self._counted(data[start:end])

    def _counted(self, data: bytes) -> bytes:
        self._size += len(data)
        if self._size > _PART_BYTES:
            raise invalid("body", "a part of the form has headers that are too long")
        return data

    def _on_header(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _on_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"filename")
        if name is None and options.get(b"name") != b"header":
            raise invalid("body", "a part of the form is neither 'header' nor a file; leave it out")
        self._file = None if name is None else name.decode("utf-8", "replace")

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is None:
            self._header += data[start:end]
            if len(self._header) > _HEADER_BYTES:
                raise invalid("header", "it is too long; send fewer example prompts")
            return
        self._out.append(adapters_pb2.FileChunk(file=self._file, data=bytes(data[start:end])))

    def _on_end(self) -> None:
        if self._file is not None:
            return
        self._out.append(bytes(self._header))
        self._header.clear()
