"""The API's definition and the stubs made from it."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor

from mora_serve.v1 import adapters_pb2, generation_pb2, router_pb2, server_pb2

ROOT = Path(__file__).parents[1]
PROTOS = sorted((ROOT / "proto/mora_serve/v1").glob("*.proto"))
FILES = [m.DESCRIPTOR for m in (adapters_pb2, generation_pb2, router_pb2, server_pb2)]


def test_stubs_are_what_the_protos_generate(tmp_path):
    """Regenerating gives the committed files, byte for byte, and no others."""
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", *out]
    subprocess.run([*command, *map(str, PROTOS)], check=True)
    made = {p.name: p.read_bytes() for p in (tmp_path / "mora_serve/v1").iterdir()}
    kept = {p.name: p.read_bytes() for p in (ROOT / "mora_serve/v1").glob("*_pb2*.py*")}
    assert made.keys() == kept.keys()
    assert [name for name in made if made[name] != kept[name]] == []


def test_every_proto_is_described():
    """The tests below see each file."""
    assert {f.name for f in FILES} == {f"mora_serve/v1/{p.name}" for p in PROTOS}


@pytest.mark.parametrize("file", FILES, ids=lambda f: Path(f.name).stem)
def test_names_follow_the_common_rules(file: FileDescriptor):
    """Services end in Service, calls have messages of their own, enums begin unspecified."""
    assert file.package == "mora_serve.v1"
    for service in file.services_by_name.values():
        assert service.name.endswith("Service")
        for method in service.methods:
            assert method.input_type.name == f"{method.name}Request"
            assert method.output_type.name == f"{method.name}Response"
    for enum in file.enum_types_by_name.values():
        prefix = "".join("_" + c if c.isupper() else c for c in enum.name).strip("_").upper()
        assert all(value.name.startswith(f"{prefix}_") for value in enum.values)
        assert enum.values_by_number[0].name == f"{prefix}_UNSPECIFIED"


@pytest.mark.parametrize("path", PROTOS, ids=lambda p: p.stem)
def test_everything_declared_is_explained(path: Path):
    """Each message, field, call and enum value has a comment above it."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    header = ("syntax", "import")
    bare = [
        line
        for above, line in itertools.pairwise(lines)
        if line and not line.startswith(("//", "}", *header)) and not above.startswith("//")
    ]
    assert bare == []


def test_the_stubs_register_in_the_default_pool():
    """Reflection serves what the pool knows."""
    pool = descriptor_pool.Default()
    services = [s.full_name for f in FILES for s in f.services_by_name.values()]
    assert services == [pool.FindServiceByName(name).full_name for name in services]
    assert len(services) == 4
