"""A page from sections: one HTML file that needs no other."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #222;
       max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; background: #fff; }
h1 { font-size: 1.7rem; margin-bottom: .3rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem; border-top: 1px solid #ddd; padding-top: 1.4rem; }
p { margin: .5rem 0; max-width: 46rem; }
p.read { color: #555; }
p.made { color: #555; font-size: .9rem; }
nav { columns: 2; font-size: .95rem; margin: 1rem 0; }
nav a { display: block; color: #0072B2; text-decoration: none; }
img { max-width: 100%; height: auto; margin: .8rem 0; display: block; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; margin: .8rem 0; }
caption { text-align: left; color: #555; padding-bottom: .3rem; }
th, td { padding: .22rem .6rem; text-align: right; border-bottom: 1px solid #eee;
         font-variant-numeric: tabular-nums; vertical-align: top; }
th { border-bottom: 1px solid #999; font-weight: 600; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
tr.total td { font-weight: 600; border-top: 1px solid #999; }
td:not(.text):not(:first-child) { white-space: nowrap; }
td.short { color: #b34700; font-weight: 600; }
"""


@dataclass(frozen=True)
class Table:
    """Rows of cells as text; figures stand on the right, columns of ``text`` on the left.

    The last ``totals`` rows are set off. A cell in ``short`` (row, column) falls short of a bar.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    totals: int = 0
    text: Sequence[int] = ()
    short: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Section:
    """One picture: what it ``shows`` and how to ``read`` it, the tables with its figures.

    ``image`` is a data URI, empty for none; ``alt`` is its text for who cannot see it.
    """

    title: str
    shows: str
    read: str = ""
    image: str = ""
    alt: str = ""
    tables: Sequence[Table] = field(default_factory=tuple)


def page(title: str, lead: Sequence[str], sections: Sequence[Section], made: str) -> str:
    """The whole page; ``lead`` are paragraphs ahead of the sections, ``made`` its last line."""
    anchors = [f"s{i}" for i in range(1, len(sections) + 1)]
    links = "".join(
        f'<a href="#{anchor}">{i}. {html.escape(section.title)}</a>'
        for i, (anchor, section) in enumerate(zip(anchors, sections, strict=True), 1)
    )
    body = "".join(
        _section(anchor, f"{i}. {section.title}", section)
        for i, (anchor, section) in enumerate(zip(anchors, sections, strict=True), 1)
    )
    paragraphs = "".join(f"<p>{html.escape(text)}</p>" for text in lead)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{paragraphs}\n<nav>{links}</nav>\n{body}"
        f'<p class="made">{html.escape(made)}</p>\n</body>\n</html>\n'
    )


def _section(anchor: str, title: str, section: Section) -> str:
    parts = [f'<h2 id="{anchor}">{html.escape(title)}</h2>', f"<p>{html.escape(section.shows)}</p>"]
    if section.read:
        parts.append(f'<p class="read">{html.escape(section.read)}</p>')
    if section.image:
        alt = html.escape(section.alt or section.shows, quote=True)
        parts.append(f'<img src="{section.image}" alt="{alt}">')
    parts += [_table(table) for table in section.tables]
    return "\n".join(parts) + "\n"


def _table(table: Table) -> str:
    def cell(tag: str, text: str, column: int, kind: str = "") -> str:
        kinds = " ".join(k for k in ("text" if column in table.text else "", kind) if k)
        attribute = f' class="{kinds}"' if kinds else ""
        return f"<{tag}{attribute}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", text, j) for j, text in enumerate(table.head))
    rows = []
    for i, row in enumerate(table.rows):
        cells = "".join(
            cell("td", text, j, "short" if (i, j) in table.short else "")
            for j, text in enumerate(row)
        )
        last = i >= len(table.rows) - table.totals
        rows.append(f'<tr class="total">{cells}</tr>' if last else f"<tr>{cells}</tr>")
    caption = f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    return (
        f'<div class="table"><table>{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
