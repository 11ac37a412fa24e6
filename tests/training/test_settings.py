"""Settings files: values arrive as typed fields, and every mistake says what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from mora_serve.errors import InvalidArgument
from router_training.settings import read_settings


@dataclass(frozen=True)
class Garden:
    plants: tuple[str, ...]
    kind: Literal["formal", "wild"] = "wild"
    rows: int = 3
    width: float = 1.5
    fenced: bool = False
    owner: str | None = None


def read(tmp_path, text):
    file = tmp_path / "garden.yaml"
    file.write_text(text)
    return read_settings(file, Garden)


def test_values_arrive_as_the_fields_types(tmp_path):
    """A list becomes a tuple, one text a tuple of it, a whole number a number."""
    text = "plants: [rose, oak]\nkind: formal\nrows: 4\nwidth: 2\nfenced: true\nowner: Ann"
    assert read(tmp_path, text) == Garden(("rose", "oak"), "formal", 4, 2.0, True, "Ann")
    assert read(tmp_path, "plants: rose") == Garden(("rose",))
    assert read(tmp_path, "plants: []\nowner: null") == Garden(())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plants: [a]\nkinds: wild", "kinds: this key is not known; did you mean 'kind'?"),
        ("plants: [a]\nzzz: 1", "zzz: this key is not known; known are plants, kind"),
        ("kind: wild", "plants: it is missing; give it"),
        ("plants: [a, 1]", "plants: it has to be a list of texts"),
        ("plants: [a]\nkind: tidy", "kind: 'tidy' is not one of formal, wild"),
        ("plants: [a]\nrows: 1.5", "rows: 1.5 is not a whole number"),
        ("plants: [a]\nrows: true", "rows: True is not a whole number"),
        ("plants: [a]\nwidth: wide", "width: 'wide' is not a number"),
        ("plants: [a]\nfenced: 1", "fenced: 1 is not true or false"),
        ("plants: [a", "garden.yaml: it is not YAML"),
        ("plants: 2024-13-45", "garden.yaml: it is not YAML"),
        ("[" * 3000, "garden.yaml: it is not YAML"),
        ("- a", "garden.yaml: it has to map keys to values"),
    ],
)
def test_every_mistake_is_named_with_its_remedy(tmp_path, text, message):
    """The key, the value, and what would be right; of an unknown key, the nearest."""
    with pytest.raises(InvalidArgument) as error:
        read(tmp_path, text)
    assert error.value.message.startswith(message)


def test_a_file_that_is_not_there_is_named_without_its_directory(tmp_path):
    """No path in the message."""
    with pytest.raises(InvalidArgument, match=r"^none\.yaml: it cannot be read") as error:
        read_settings(tmp_path / "none.yaml", Garden)
    assert str(tmp_path) not in error.value.message
