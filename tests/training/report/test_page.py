"""The page: one file, nothing from outside, nothing from its figures taken for markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from router_training.report.page import Section, Table, page

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=30)


class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@given(TEXT, TEXT, TEXT)
def test_texts_stay_texts(title, shows, cell):
    """Whatever stands in them, tags are only the page's own, and all are closed."""
    section = Section(title, shows, cell, tables=[Table([cell], [[shows]], title)])
    reader = Reader(page(title, [shows], [section], cell))
    assert not reader.open
    plain = Reader(
        page("t", ["s"], [Section("t", "s", "c", tables=[Table(["c"], [["s"]], "t")])], "c")
    )
    shown = bool(cell), bool(title)
    if all(shown):
        assert [tag for tag, _ in reader.tags] == [tag for tag, _ in plain.tags]
    assert shows in "".join(reader.text)


def test_a_page_needs_no_other_file():
    """Pictures are part of it; links lead to its own sections."""
    image = "data:image/svg+xml;base64,AAAA"
    sections = [Section("one", "shows", image=image, alt="a picture"), Section("two", "shows")]
    text = page("title", [], sections, "made")
    reader = Reader(text)
    for tag, attributes in reader.tags:
        assert attributes.get("src", image) == image
        assert attributes.get("href", "#").startswith("#")
        assert tag not in ("script", "link")
    targets = {a["id"] for t, a in reader.tags if t == "h2"}
    assert {a["href"][1:] for t, a in reader.tags if t == "a"} == targets
    assert "http" not in text
    assert ("img", {"src": image, "alt": "a picture"}) in reader.tags


def test_tables_mark_totals_and_what_falls_short():
    """The last rows are set off, a cell below its bar is in colour, text stands on the left."""
    table = Table(
        ["name", "figure", "note"],
        [["a", "1", "x"], ["mean", "2", "y"]],
        totals=1,
        text=(2,),
        short=frozenset({(0, 1)}),
    )
    text = page("t", [], [Section("s", "shows", tables=[table])], "m")
    assert '<td class="short">1</td><td class="text">x</td>' in text
    assert re.search(r'<tr class="total"><td>mean</td><td>2</td>', text)
