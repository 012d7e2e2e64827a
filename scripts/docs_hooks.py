"""What MkDocs does not do by itself: files of the repository that a page links to become part of the site."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = re.compile(r"\]\(\.\./([\w./-]+)\)")
"""A link from a page to a file beside docs/."""
NAMED = re.compile(r"\[(\w+\.md)\](?=\(\1)")
"""A link whose text is the name of the page it leads to."""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what pages link to, under source/."""
    for page in list(files.documentation_pages()):
        for name in OUTSIDE.findall(page.content_string):
            uri = f"source/{name}"
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, *, config: MkDocsConfig, **_: Any) -> str:
    """Lead the links there, and call pages by their titles where the text of a link is a file's name."""
    titles = dict(_titles(config.nav))
    markdown = OUTSIDE.sub(r"](source/\1)", markdown)
    return NAMED.sub(lambda link: f"[{titles.get(link[1], link[1])}]", markdown)


def _titles(nav: Any) -> Iterator[tuple[str, str]]:
    """(file, title) of every page in the navigation that has one."""
    for entry in nav:
        for title, part in entry.items() if isinstance(entry, dict) else ():
            yield from [(part, title)] if isinstance(part, str) else _titles(part)
