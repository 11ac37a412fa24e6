"""Training rows from JSONL files: {"prompt": ..., "answer": ..., "adapters": [...]} a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mora_serve.errors import InvalidArgument
from mora_serve.model.tokenizer import Tokenizer
from router_training.batches import TokenRow


@dataclass(frozen=True, slots=True)
class TextRow:
    """A prompt, its answer and the names of the adapters it is for; without labels none."""

    prompt: str
    answer: str
    adapters: tuple[str, ...] = ()


def read_rows(files: Sequence[Path], *, labelled: bool) -> list[TextRow]:
    """The rows of all files; keys beside the three are left alone.

    Raises InvalidArgument, naming file and line, for a file that cannot be read, a line that is
    no such row, or, where they are to be ``labelled``, a row without adapters.
    """
    return [row for file in files for row in _rows(file, labelled)]


def _rows(file: Path, labelled: bool) -> Iterator[TextRow]:
    for number, line in _lines(file):
        where = f"{file.name}, line {number}"
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise _wrong(where, "it is not a JSON object", '{"prompt": "...", "answer": "..."}')
        texts = [values.get(key) for key in ("prompt", "answer")]
        prompt, answer = (t if isinstance(t, str) else "" for t in texts)
        if not prompt.strip() or not answer:
            raise _wrong(where, "prompt and answer have to be texts", "both")
        names = values.get("adapters", [])
        if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
            raise _wrong(where, "adapters have to be a list of names", '"adapters": ["name"]')
        if labelled and not names:
            raise _wrong(where, "the row has no adapters", '"adapters": ["name"]')
        yield TextRow(prompt, answer, tuple(dict.fromkeys(names)))


def read_prompts(files: Sequence[Path]) -> list[str]:
    """Prompts from text files, one a line, empty lines left out.

    Raises InvalidArgument for a file that cannot be read.
    """
    return [line.strip() for file in files for _, line in _lines(file)]


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise _wrong(file.name, f"it cannot be read ({type(e).__name__})", "a UTF-8 file") from e
    yield from ((n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip())


def token_row(tokenizer: Tokenizer, row: TextRow, limit: int) -> TokenRow:
    """A row's tokens, as the server would send its prompt to the base.

    Raises InvalidArgument where they are more than ``limit``.
    """
    prompt, answer = tokenizer.row(row.prompt, row.answer)
    if len(prompt) + len(answer) > limit:
        raise InvalidArgument(
            f"data: a row has {len(prompt) + len(answer)} tokens, the base takes {limit}; "
            "leave it out or shorten it",
            field="data",
        )
    return TokenRow(tuple(prompt), tuple(answer))


def _wrong(where: str, what: str, give: str) -> InvalidArgument:
    return InvalidArgument(f"data: {where}: {what}; give {give}", field="data")
