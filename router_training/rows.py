"""Training rows from JSONL files: {"prompt": ..., "answer": ..., "adapters": [...]} a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mora_serve.errors import InvalidArgument
from mora_serve.model.tokenizer import Tokenizer
from router_training.batches import TokenRow

KEY = "data"  # of the settings that name the files, where nothing else is said


@dataclass(frozen=True, slots=True)
class TextRow:
    """A prompt, its answer and the names of the adapters it is for; without labels none.

    ``where`` is the file and line that it comes from, if it comes from one.
    """

    prompt: str
    answer: str
    adapters: tuple[str, ...] = ()
    where: str = field(default="a row", compare=False)


def read_rows(files: Sequence[Path], key: str = KEY, *, labelled: bool) -> list[TextRow]:
    """The rows of all files, which the settings name under ``key``; keys of a row beside the
    three are left alone.

    Raises InvalidArgument, naming file and line, for a file that cannot be read, a line that is
    no such row, or, where they are to be ``labelled``, a row without adapters.
    """
    return [row for file in files for row in _rows(file, key, labelled)]


def _rows(file: Path, key: str, labelled: bool) -> Iterator[TextRow]:
    for where, values in read_objects(file, key):
        if values is None:
            raise _wrong(
                key, where, "it is not a JSON object", '{"prompt": "...", "answer": "..."}'
            )
        texts = [values.get(name) for name in ("prompt", "answer")]
        prompt, answer = (t if isinstance(t, str) else "" for t in texts)
        if not prompt.strip() or not answer:
            raise _wrong(key, where, "prompt and answer have to be texts", "both")
        names = values.get("adapters") or []
        if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
            raise _wrong(key, where, "adapters have to be a list of names", '"adapters": ["name"]')
        if labelled and not names:
            raise _wrong(key, where, "the row has no adapters", '"adapters": ["name"]')
        yield TextRow(prompt, answer, tuple(dict.fromkeys(names)), where)


def read_objects(file: Path, key: str) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Where each line that is not empty stands, and its JSON object, or None where it is none.

    Raises InvalidArgument for a file that cannot be read.
    """
    for where, line in read_lines(file, key):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        yield where, values if isinstance(values, dict) else None


def read_prompts(files: Sequence[Path], key: str) -> list[str]:
    """Prompts from text files, one a line, empty lines left out.

    Raises InvalidArgument for a file that cannot be read.
    """
    return [line.strip() for file in files for _, line in read_lines(file, key)]


def read_lines(file: Path, key: str) -> Iterator[tuple[str, str]]:
    """Where each line that is not empty stands, and the line.

    Only line feeds end it: a JSON text may hold what ``splitlines`` cuts at besides. Raises
    InvalidArgument for a file that cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        what = f"it cannot be read ({type(e).__name__})"
        raise _wrong(key, file.name, what, "a UTF-8 file") from e
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{file.name}, line {number}", line


def token_row(tokenizer: Tokenizer, row: TextRow, limit: int, key: str = KEY) -> TokenRow:
    """A row's tokens, as the server would send its prompt to the base.

    Raises InvalidArgument where they are more than ``limit``.
    """
    prompt, answer = tokenizer.row(row.prompt, row.answer)
    if len(prompt) + len(answer) > limit:
        raise InvalidArgument(
            f"{key}: {row.where} has {len(prompt) + len(answer)} tokens, the base takes {limit}; "
            "leave it out or shorten it",
            field=key,
        )
    return TokenRow(tuple(prompt), tuple(answer))


def _wrong(key: str, where: str, what: str, give: str) -> InvalidArgument:
    return InvalidArgument(f"{key}: {where}: {what}; give {give}", field=key)
