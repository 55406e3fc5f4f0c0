"""Hooks of mkdocs: README.md is the site's first page, CONTRIBUTING.md and CHANGELOG.md are pages too, and links that
leave docs/, as they stand for readers of the repository, lead to copies of these files in the site.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = {
    ROOT / "README.md": "index.md",
    ROOT / "CONTRIBUTING.md": "contributing.md",
    ROOT / "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def _target(source: Path, link: str) -> Path | None:
    """The file that a link of the page ``source`` names, None if it is no file of the repository."""
    path = Path(os.path.normpath(source.parent / link))
    return path if path.is_file() and path.is_relative_to(ROOT) else None


def _place(path: Path) -> str:
    """Where a file of the repository is in the site."""
    if path in PAGES:
        return PAGES[path]
    return str(path.relative_to(DOCS) if path.is_relative_to(DOCS) else Path("files") / path.relative_to(ROOT))


def on_files(files: Files, *, config: Any) -> Files:
    for path, place in PAGES.items():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    for page in [file for file in files if file.src_uri.endswith(".md")]:
        source = Path(page.abs_src_path)
        for found in _LINK.finditer(source.read_text(encoding="utf-8")):
            path = _target(source, found[2])
            if path is not None and files.get_file_from_path(_place(path)) is None:
                files.append(File.generated(config, _place(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    source = Path(page.file.abs_src_path)
    here = Path(page.file.src_uri).parent

    def moved(found: re.Match[str]) -> str:
        path = _target(source, found[2])
        return found[0] if path is None else found[1] + os.path.relpath(_place(path), here) + found[3]

    return _LINK.sub(moved, markdown)
