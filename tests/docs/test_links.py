"""Links between the pages lead somewhere, pictures exist, and every page can be reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, links

FILES = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]


@pytest.mark.parametrize("page", FILES, ids=lambda p: p.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    lost = []
    for link in links(page.read_text()):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            lost.append(link)
    assert lost == []


def test_the_readme_leads_to_every_page() -> None:
    readme = links((ROOT / "README.md").read_text())
    assert {f"docs/{p.name}" for p in PAGES[1:]} <= {link.partition("#")[0] for link in readme}


def test_every_picture_of_the_pages_is_shown() -> None:
    shown = {
        (page.parent / link).resolve()
        for page in PAGES
        for link in links(page.read_text())
        if link.endswith(".png")
    }
    assert set((ROOT / "docs").rglob("*.png")) <= shown
