"""One page of everything measured about serving: the newest result of each kind. Knows files; measures nothing."""

from __future__ import annotations

import re
from pathlib import Path

DATED = re.compile(r"(?P<kind>serving-[a-z-]+)-\d{8}-\d{4}\.md")


def collect(folder: Path) -> Path:
    """Write `serving.md` anew from the newest `serving-KIND-DATE.md` of each kind; returns it."""
    newest: dict[str, Path] = {}
    for path in sorted(folder.glob("serving-*.md")):  # dates sort as text
        if found := DATED.fullmatch(path.name):
            newest[found["kind"]] = path
    parts = ["# Serving", "The newest measurement of each kind. The `.json` beside each holds every figure."]
    for path in newest.values():
        title, _, rest = path.read_text(encoding="utf-8").partition("\n")
        parts += [f"## {title.removeprefix('# ')} (`{path.stem}`)", rest.strip()]
    page = folder / "serving.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page
