"""Generated pages: written only when they changed, and removed when nothing generates them any more."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def write_pages(folder: Path, pages: Mapping[str, str]) -> None:
    """Make a folder hold exactly these pages; a page that did not change keeps its date, so Sphinx skips it.

    Args:
        folder: where the pages go.
        pages: the text of each page, by its file name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.md"):
        if file.name not in pages:
            file.unlink()
    for name, text in pages.items():
        file = folder / name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def table(rows: list[Mapping[str, str]]) -> str:
    """A Markdown table of rows under their keys; a key that a row lacks leaves its cell empty."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    lines = [heads, ["---"] * len(heads), *[[row.get(head, "") for head in heads] for row in rows]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def toctree(names: list[str], **options: str) -> str:
    """A table of contents of the pages beside the page that has it."""
    settings = "".join(f":{name}: {value}\n" for name, value in options.items())
    return "```{toctree}\n" + settings + "\n" + "\n".join(names) + "\n```\n"
