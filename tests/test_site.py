"""The docs as a site: it builds without a warning, asks for nothing from elsewhere, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import halfbyte

ROOT = Path(__file__).parent.parent


class Page(HTMLParser):
    """What a page loads, where it links to, and which anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if "id" in values:
            self.anchors.add(values["id"])
        if tag == "a":
            self.links.append(values.get("href", ""))
        elif "src" in values or (tag == "link" and values.get("rel") != "canonical"):
            self.loads.append(values.get("src") or values.get("href", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder], cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    pages = {path.stem for path in site.glob("*.html")}
    assert pages - {"404"} == {path.stem for path in (ROOT / "docs").glob("*.md")}


def test_nothing_comes_from_elsewhere_and_links_lead_somewhere(site: Path) -> None:
    pages = {path.name: Page(path.read_text(encoding="utf-8")) for path in site.glob("*.html")}
    for name, page in pages.items():
        if name == "404.html":  # its paths begin at the server's root
            continue
        assert page.loads
        for address in page.loads:
            assert not re.match(r"(https?:)?//", address), f"{name} loads {address}"
            assert (site / address.partition("?")[0]).is_file(), f"{name} loads {address}"
        for link in page.links:
            if re.match(r"https?://|mailto:", link):
                continue
            target, _, anchor = unquote(link).partition("#")
            assert (site / (target or name)).exists(), f"{name} links to {link}"
            if anchor and (target or name) in pages:
                assert anchor in pages[target or name].anchors | {"__skip"}, f"{name} links to {link}"
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.findall(r"url\([\"']?(https?:)?//|@import", styles)


def test_the_python_page_has_every_public_name(site: Path) -> None:
    anchors = Page((site / "api.html").read_text(encoding="utf-8")).anchors
    missing = [name for name in halfbyte.__all__ if not any(anchor.endswith(f".{name}") for anchor in anchors)]
    assert missing == []


def test_what_troubleshooting_names_is_said(site: Path) -> None:
    """What stands in the first column as said by halfbyte stands in its source."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    rows = re.findall(
        r"^\| (`.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(rows) >= 8
    for row in rows:
        for said in re.findall(r"`([^`]+)`", row):
            assert said in source, said
