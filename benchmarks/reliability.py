"""Writes docs/reliability.md, whose tables come from several commands."""

from __future__ import annotations

from pathlib import Path

from pages import fill

HERE = Path(__file__).resolve().parent


def write_page(folder: Path, **tables: str) -> None:
    """Writes the page with these tables, and with those of the other commands as they were.

    Args:
        folder: where the tables are kept.
        **tables: by the name of their place in `reliability_page.md`.
    """
    for name, text in tables.items():
        (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    kept = {
        name: (folder / f"{name}.md").read_text(encoding="utf-8").strip()
        for name in ("faults", "soak")
        if (folder / f"{name}.md").exists()
    }
    page = (HERE / "reliability_page.md").read_text(encoding="utf-8")
    (HERE.parent / "docs/reliability.md").write_text(fill(page, kept), encoding="utf-8")
