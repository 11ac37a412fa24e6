"""The newcomer's path is that of the quick start."""

from __future__ import annotations

from benchmarks import newcomer
from tests.docs.pages import ROOT, blocks, commands


def test_each_command_that_is_timed_stands_in_the_page_in_this_order() -> None:
    page = [
        c.partition("  #")[0].strip()
        for block in blocks(ROOT / "docs/quickstart.md")
        if block.language == "sh"
        for c in commands(block.text)
    ]
    timed = [*newcomer.CLONE, *newcomer.ANSWER, *newcomer.ADAPTER]
    places = [next(i for i, c in enumerate(page) if c.startswith(t)) for t in timed[:-1]]
    assert places == sorted(places)
    assert timed[-1] in page[places[-1] :]
