"""The API's reference as a page, ``docs/api.md``: what the .proto files say, made with protoc.

python -m benchmarks.api_reference           write the page
python -m benchmarks.api_reference --check   exit with 1 where it is not what the files say
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/api.md"
PACKAGE = ".mora_serve.v1."

HEAD = """\
# API reference

<!-- Written by `make proto` from proto/mora_serve/v1; a change belongs there. -->

gRPC, package `mora_serve.v1`; health and reflection are served beside it. The same calls as JSON
over HTTP, and OpenAI's: [http.md](http.md). Errors are gRPC's codes with `google.rpc.ErrorInfo`,
whose `reason` is stable; the message names the field, the value and the remedy.
"""

# Numbers of fields in descriptor.proto, which the paths of comments are made of.
_MESSAGE, _ENUM, _SERVICE = 4, 5, 6
_FIELD, _NESTED, _NESTED_ENUM, _ONEOF = 2, 3, 4, 8
_METHOD, _VALUE = 2, 2

Comments = Mapping[tuple[int, ...], str]
Path_ = tuple[int, ...]


def files() -> list[FileDescriptorProto]:
    """What protoc reads of the .proto files, comments included, in the order of their names."""
    protos = sorted((ROOT / "proto/mora_serve/v1").glob("*.proto"))
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "set"
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}"]
        options = ["--include_source_info", f"--descriptor_set_out={out}"]
        subprocess.run([*command, *options, *map(str, protos)], check=True)
        return list(FileDescriptorSet.FromString(out.read_bytes()).file)


def page(described: Sequence[FileDescriptorProto]) -> str:
    """The page: a section a file, in it the services, then the messages and enums."""
    parts = [HEAD]
    for file in described:
        comments = {
            tuple(place.path): " ".join(place.leading_comments.split())
            for place in file.source_code_info.location
            if place.leading_comments
        }
        parts += _file(file, comments)
    return "\n".join(parts)


def _file(file: FileDescriptorProto, comments: Comments) -> Iterator[str]:
    yield f"## {file.name.rpartition('/')[2]}\n"
    yield f"{comments.get((2,), '')}\n"  # the comment of the package
    for i, service in enumerate(file.service):
        yield from _service(service, (_SERVICE, i), comments)
    for i, message in enumerate(file.message_type):
        yield from _message(message, (_MESSAGE, i), comments)
    for i, enum in enumerate(file.enum_type):
        yield from _enum(enum, (_ENUM, i), comments)


def _service(service: ServiceDescriptorProto, path: Path_, comments: Comments) -> Iterator[str]:
    yield f"### {service.name}\n"
    yield f"{comments.get(path, '')}\n"
    yield "| call | takes | gives | |"
    yield "|---|---|---|---|"
    for i, method in enumerate(service.method):
        takes = _link(method.input_type, stream=method.client_streaming)
        gives = _link(method.output_type, stream=method.server_streaming)
        text = _cell(comments.get((*path, _METHOD, i), ""))
        yield f"| `{method.name}` | {takes} | {gives} | {text} |"
    yield ""


def _message(message: DescriptorProto, path: Path_, comments: Comments) -> Iterator[str]:
    yield f"### {message.name}\n"
    yield f"{comments.get(path, '')}\n"
    if message.field:
        yield "| field | type | |"
        yield "|---|---|---|"
    for i, field in enumerate(message.field):
        text = comments.get((*path, _FIELD, i), "")
        if field.HasField("oneof_index") and not field.proto3_optional:
            group = message.oneof_decl[field.oneof_index].name
            about = comments.get((*path, _ONEOF, field.oneof_index), "")
            first = (
                next(
                    f
                    for f in message.field
                    if f.HasField("oneof_index") and f.oneof_index == field.oneof_index
                )
                is field
            )
            text = f"{text} One of `{group}`" + (f": {about}" if first and about else ".")
        yield f"| `{field.name}` | {_type(field)} | {_cell(text)} |"
    if message.field:
        yield ""
    for i, nested in enumerate(message.nested_type):
        yield from _message(nested, (*path, _NESTED, i), comments)
    for i, enum in enumerate(message.enum_type):
        yield from _enum(enum, (*path, _NESTED_ENUM, i), comments)


def _enum(enum: EnumDescriptorProto, path: Path_, comments: Comments) -> Iterator[str]:
    yield f"### {enum.name}\n"
    yield f"{comments.get(path, '')}\n"
    yield "| value | number | |"
    yield "|---|---:|---|"
    for i, value in enumerate(enum.value):
        text = _cell(comments.get((*path, _VALUE, i), ""))
        yield f"| `{value.name}` | {value.number} | {text} |"
    yield ""


def _type(field: FieldDescriptorProto) -> str:
    if field.type_name:
        name = _link(field.type_name)
    else:
        name = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def _link(name: str, *, stream: bool = False) -> str:
    """A type's name, with a link where the page has it."""
    short = name.removeprefix(PACKAGE)
    text = f"[{short}](#{short.lower()})" if name.startswith(PACKAGE) else f"`{name.lstrip('.')}`"
    return f"stream of {text}" if stream else text


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or compare."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.api_reference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    args = parser.parse_args(argv)
    text = page(files())
    if args.check:
        return int(not PAGE.is_file() or PAGE.read_text() != text)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
