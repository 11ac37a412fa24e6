"""The README and the pages of docs/, taken apart: blocks of code, commands, links, headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEREDOC = re.compile(r"<<'?(\w+)'?")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page by name, the number of its first line, its language, its text.

    ``output`` is the text block right behind it, which says what it prints.
    """

    page: str
    line: int
    language: str
    text: str
    output: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The blocks of a page."""
    text = page.read_text()
    found: list[Block] = []
    end = -1
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        block = Block(page.name, line, match[1], match[2])
        if block.language == "text" and found and not text[end : match.start()].strip():
            last = found[-1]
            found[-1] = Block(last.page, last.line, last.language, last.text, block.text)
        found.append(block)
        end = match.end()
    return found


def blocks_of(language: str) -> list[Block]:
    """The blocks of all pages in one language."""
    return [b for page in PAGES for b in blocks(page) if b.language == language]


def commands(text: str) -> Iterator[str]:
    """The commands of a shell block, each with the lines that belong to it; no bare comments."""
    lines = iter(text.splitlines())
    for command in lines:
        while command.endswith("\\") or _open(command):
            command += "\n" + next(lines)
        if here := _HEREDOC.search(command):
            for more in lines:
                command += "\n" + more
                if more == here[1]:
                    break
        if words(command):
            yield command


def words(command: str) -> list[str]:
    """A command's words, as far as a document that it reads, or a file that it writes."""
    return shlex.split(re.split(r" (?:<<|>) ?", command.replace("\\\n", " "))[0], comments=True)


def _open(command: str) -> bool:
    """Whether a quotation goes on in the next line."""
    try:
        words(command.removesuffix("\\"))
    except ValueError:
        return True
    return False


def prose(text: str) -> str:
    """A page without its blocks."""
    return _FENCE.sub("", text)


def links(text: str) -> list[str]:
    """Where a page's links and pictures lead."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


def anchors(text: str) -> set[str]:
    """What can stand behind # in a link to a page: its headings as GitHub names them."""
    seen: dict[str, int] = {}
    out = set()
    for heading in re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = seen.get(name, 0)
        seen[name] = count + 1
        out.add(f"{name}-{count}" if count else name)
    return out
