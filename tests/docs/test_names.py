"""Files, classes and functions that the pages name exist."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from mora_serve.config import keys
from tests.docs.pages import PAGES, ROOT, prose

NAMING = ("request.md", "architecture.md")
_PATH = re.compile(r"[\w./-]+\.(?:py|proto|c|h|md|toml|js|json)|[\w-]+(?:/[\w-]+)*/")
_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


def quoted(text: str) -> list[list[str]]:
    """What stands in backquotes, by section."""
    parts = re.split(r"^#+ .*$", prose(text), flags=re.MULTILINE)
    return [re.findall(r"`([^`\n]+)`", part) for part in parts]


@functools.cache
def defined(file: Path) -> set[str]:
    """Names of a module: at its top, and of its classes as Class.name."""
    out: set[str] = set()

    def visit(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                out.add(prefix + node.name)
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                out.add(prefix + node.name)
            elif isinstance(node, ast.Assign):
                out.update(prefix + t.id for t in node.targets if isinstance(t, ast.Name))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                out.add(prefix + node.target.id)

    visit(ast.parse(file.read_text()).body, "")
    return out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_of_the_repository_exist(page: Path) -> None:
    roots = tuple(p.name for p in ROOT.iterdir() if p.is_dir())
    named = [t for part in quoted(page.read_text()) for t in part if _PATH.fullmatch(t)]
    own = [t for t in named if t.startswith(tuple(f"{r}/" for r in roots))]
    assert [t for t in own if not (ROOT / t).exists()] == []


@pytest.mark.parametrize("name", NAMING)
def test_classes_and_functions_are_in_the_file_that_is_named_before_them(name: str) -> None:
    """`mora_serve/file.py`, `Class.method`: each name belongs to the last file of its section."""
    found = 0
    for part in quoted((ROOT / "docs" / name).read_text()):
        file: Path | None = None
        for token in part:
            if token.endswith(".py"):
                file = ROOT / token
            elif _NAME.fullmatch(token) and file is not None and token not in keys():
                if _PATH.fullmatch(token):
                    continue
                assert token in defined(file), f"{token} is not in {file.name}"
                found += 1
    assert found >= 15
