"""Rows of files of every kind, each with where it stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
from pyarrow import parquet

from mora_serve.errors import InvalidArgument
from router_training.tuning.settings import Dataset
from router_training.tuning.sources import rows_of

ROWS = [{"prompt": f"p{i}", "completion": 'é, "x"\n'} for i in range(5)]


def write(folder: Path, name: str) -> Path:
    file = folder / name
    if name.endswith(".parquet"):
        parquet.write_table(arrow.Table.from_pylist(ROWS), file)
    elif name.endswith(".csv"):
        lines = ["prompt,completion", *(f'{r["prompt"]},"é, ""x""\n"' for r in ROWS)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8-sig", newline="")
    elif name == "lines.json" or name.endswith(".jsonl"):
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif name == "nested.json":
        file.write_text(json.dumps({"version": 1, "data": ROWS}))
    else:
        file.write_text(json.dumps(ROWS))
    return file


@pytest.mark.parametrize(
    "name", ["a.jsonl", "list.json", "nested.json", "lines.json", "a.parquet", "a.csv"]
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    """A spreadsheet's mark at the start of a CSV is no part of a column's name."""
    file = write(tmp_path, name)
    found = list(rows_of(Dataset(str(file))))
    assert [dict(row) for _, row in found] == ROWS
    assert all(where.startswith(name) for where, _ in found)
    assert len({where for where, _ in found}) == len(ROWS)
    assert [dict(row) for _, row in rows_of(Dataset(str(file), rows=2))] == ROWS[:2]


def test_a_folder_gives_its_files_in_order_or_those_named(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.parquet"):
        write(tmp_path, name)
    (tmp_path / "notes.txt").write_text("no rows")
    found = [where for where, _ in rows_of(Dataset(str(tmp_path)))]
    assert [where.split(".")[0] for where in found] == ["a"] * 5 + ["b"] * 5
    named = Dataset(str(tmp_path), data_files=("b.jsonl",))
    assert all(where.startswith("b.jsonl") for where, _ in rows_of(named))


def test_a_path_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "a.jsonl")
    assert len(list(rows_of(Dataset("~/a.jsonl")))) == len(ROWS)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.parquet", b"PAR1 no more", {}, "it is not a parquet file"),
        ("a.csv", b"prompt\n" + b"x" * 200_000 + b"\n", {}, "it cannot be read"),
        ("a.jsonl", b"\xff\n", {}, "datasets"),
        ("empty", None, {}, "it has no file of"),
        ("empty", None, {"data_files": ("x.jsonl",)}, "there is no 'x.jsonl'"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes | None, options: dict[str, Any], message: str
) -> None:
    place = tmp_path / name
    if content is None:
        place.mkdir()
    else:
        place.write_bytes(content)
    with pytest.raises(InvalidArgument, match=message) as caught:
        list(rows_of(Dataset(str(place), **options)))
    assert caught.value.field == "datasets"
    assert str(tmp_path) not in caught.value.message or content is None
