"""Rows of a dataset one by one, from local files or the hub, each with where it stands."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mora_serve.errors import InvalidArgument
from router_training.rows import read_objects
from router_training.tuning.settings import Dataset

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
Row = tuple[str, Mapping[str, Any]]


def rows_of(dataset: Dataset) -> Iterator[Row]:
    """Every row of a dataset, read as it is asked for.

    Raises InvalidArgument for what is not there, cannot be read, or is no object.
    """
    rows = _rows(dataset)
    yield from itertools.islice(rows, dataset.rows) if dataset.rows else rows


def _rows(dataset: Dataset) -> Iterator[Row]:
    path = Path(dataset.path).expanduser()
    if not path.exists():
        if path.suffix in SUFFIXES or dataset.path.startswith((".", "/", "~")):
            raise _wrong(dataset.path, "there is no such file", "one that is there")
        yield from _hub(dataset)
        return
    for file in files_of(dataset):
        yield from _file(file)


def files_of(dataset: Dataset) -> list[Path]:
    """The local files of a dataset, none for one of the hub. Raises InvalidArgument."""
    path = Path(dataset.path).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        return []
    named = [path / name for name in dataset.data_files]
    if missing := [f.name for f in named if not f.is_file()]:
        raise _wrong(dataset.path, f"data_files: there is no {missing[0]!r}", "those that it has")
    files = named or sorted(f for f in path.iterdir() if f.suffix in SUFFIXES)
    if not files:
        raise _wrong(dataset.path, f"it has no file of {', '.join(SUFFIXES)}", "some")
    return files


def _file(file: Path) -> Iterator[Row]:
    read = {".json": _json, ".parquet": _parquet, ".csv": _csv}.get(file.suffix, _jsonl)
    try:
        yield from read(file)
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise _wrong(file.name, f"it cannot be read ({type(e).__name__})", "another file") from e


def _jsonl(file: Path) -> Iterator[Row]:
    for where, values in read_objects(file, "datasets"):
        if values is None:
            raise _wrong(where, "it is not a JSON object", "one a line")
        yield where, values


def _json(file: Path) -> Iterator[Row]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        yield from _jsonl(file)  # many files of lines are called .json
        return
    if isinstance(values, dict):
        values = next((v for v in values.values() if isinstance(v, list)), [values])
    for number, row in enumerate(values if isinstance(values, list) else [values], 1):
        if not isinstance(row, dict):
            raise _wrong(f"{file.name}, row {number}", "it is not an object", "a list of objects")
        yield f"{file.name}, row {number}", row


def _csv(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines), 1):
            yield f"{file.name}, row {number}", row


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file.name}, row {number}", row
    except arrow.ArrowInvalid as e:
        raise _wrong(file.name, "it is not a parquet file", "another file") from e


def _hub(dataset: Dataset) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        rows = load_dataset(
            dataset.path,
            dataset.name,
            data_files=list(dataset.data_files) or None,
            split=dataset.split,
            streaming=True,
        )
        for number, row in enumerate(rows, 1):
            yield f"{dataset.path}, row {number}", row
    except Exception as e:  # of many libraries: no network, no such name, no such split
        raise _wrong(
            dataset.path,
            f"it is neither a file here nor a dataset that the hub gives ({type(e).__name__})",
            "a file, or check the name, the split and the network",
        ) from e


def _wrong(where: str, what: str, give: str) -> InvalidArgument:
    return InvalidArgument(f"datasets: {where}: {what}; give {give}", field="datasets")
