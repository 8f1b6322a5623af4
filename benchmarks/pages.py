"""Pages of docs/ whose tables a benchmark writes: prose with places for them."""

from __future__ import annotations

import re


def fill(page: str, parts: dict[str, str]) -> str:
    """The page with each part between `<!-- begin: name -->` and `<!-- end: name -->`.

    Raises:
        ValueError: the page has no place for a part.
    """
    for name, text in parts.items():
        place = re.compile(rf"(<!-- begin: {name} -->\n).*?(<!-- end: {name} -->)", re.DOTALL)
        if not place.search(page):
            raise ValueError(f"A page has a place for each part. Received: none for {name!r}.")
        page = place.sub(lambda match, text=text: f"{match[1]}\n{text}\n\n{match[2]}", page)
    return page
