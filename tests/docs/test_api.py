"""docs/api.md is what the .proto files say."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from benchmarks import api_reference


@pytest.fixture(scope="module")
def files() -> list[FileDescriptorProto]:
    return api_reference.files()


def test_the_page_is_fresh(files: list[FileDescriptorProto]) -> None:
    """`make proto` writes it."""
    assert api_reference.PAGE.read_text() == api_reference.page(files)


def test_it_has_every_call_message_field_and_value(files: list[FileDescriptorProto]) -> None:
    text = api_reference.page(files)
    for file in files:
        for service in file.service:
            assert f"### {service.name}\n" in text
            assert all(f"| `{m.name}` |" in text for m in service.method)
        for message in file.message_type:
            section = text.partition(f"### {message.name}\n")[2].partition("\n### ")[0]
            assert all(f"| `{field.name}` | " in section for field in message.field)
        for enum in file.enum_type:
            assert all(f"| `{v.name}` | {v.number} | " in text for v in enum.value)


def test_nothing_is_without_its_comment(files: list[FileDescriptorProto]) -> None:
    rows = [r for r in api_reference.page(files).splitlines() if r.startswith("| `")]
    assert [row for row in rows if row.endswith("|  |")] == []
