"""The documentation site builds without a warning and loads nothing from elsewhere.

`pytest -m docs` (`pip install -e ".[docs]"`).
"""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent
LOADS = {"script": "src", "link": "href", "img": "src", "iframe": "src", "video": "src"}
"""Tags whose address a browser loads by itself."""
ELSEWHERE = re.compile(r"^(https?:)?//")

pytestmark = pytest.mark.docs


class Page(HTMLParser):
    """What a page loads, where its links lead, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors.update(filter(None, (found.get("id"), found.get("name"))))
        address = found.get(LOADS.get(tag, ""))
        if address and found.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(address)
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason='`pip install -e ".[docs]"`')
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING -" not in done.stderr  # others advertise a successor
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {
        path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")
    }


def test_every_page_of_the_docs_is_there(site: Path) -> None:
    for path in ROOT.glob("docs/*.md"):
        assert (site / path.with_suffix(".html").name).is_file()


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        found = [address for address in page.loads if ELSEWHERE.match(address)]
        assert not found, path
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"url\(['\"]?(https?:)?//", text), path


def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        if path.name == "404.html":  # its links begin at the site's root
            continue
        for link in [*page.loads, *page.links]:
            address, _, anchor = unquote(link).partition("#")
            if ":" in address or ELSEWHERE.match(address):
                continue
            target = (path.parent / address).resolve() if address else path
            if target.is_dir():
                target = target / "index.html"
            assert target.is_file(), f"{path.relative_to(site)}: {link}"
            if anchor and target in pages:
                assert anchor in pages[target].anchors, (
                    f"{path.relative_to(site)}: {link}"
                )


def test_formulas_are_set_and_the_api_is_filled(site: Path) -> None:
    method = (site / "method.html").read_text(encoding="utf-8")
    assert method.count('<math xmlns="http://www.w3.org/1998/Math/MathML"') > 50
    assert method.count('class="tag"') > 10
    for path in site.glob("*.html"):
        assert "arithmatex" not in path.read_text(encoding="utf-8"), path
    for formula in re.findall(r"<math.*?</math>", method, re.S):
        assert "\\" not in formula
        assert "&#x029F8;" not in formula  # a stroke without its letter
    api = (site / "api.html").read_text(encoding="utf-8")
    for name in ("PicardSolver", "OptimizationTrajectory", "EMAThreshold"):
        assert f'id="dreampropeller.{name}"' in api
