"""Results as a terminal table, a Markdown page and a JSON file. Formats; measures nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.machine import Machine


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A titled table of ready text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] + ["---:"] * (len(self.columns) - 1), *self.rows]
        rows = ("| " + " | ".join(" ".join(cell.split()) for cell in line) + " |" for line in lines)
        return "\n".join([f"### {self.title}", "", *rows])

    def show(self, console: Console) -> None:
        console.print(f"\n{self.title}", style="bold", highlight=False)
        table = Table()
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


def machine_lines(machine: Machine) -> list[str]:
    has = ", ".join(machine.cpu_flags) or "none of the telling ones"
    lacks = f"; lacks {', '.join(machine.missing_flags)}" if machine.missing_flags else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return [
        f"Command: `{machine.command}`",
        f"Date: {machine.date}; revision {machine.revision or 'unknown'}",
        f"Machine: {machine.cpu}, {machine.num_cores} cores, {machine.num_threads} threads; {machine.gpu or 'no GPU'}",
        f"Processor has {has}{lacks}; load average before the run {machine.load_average}",
        f"Versions: Python {machine.python}, {versions}",
    ]


def save(
    folder: Path,
    stem: str,
    *,
    title: str,
    machine: Machine,
    settings: dict[str, object],
    grids: Sequence[Grid],
    figures: dict[str, object],
) -> Path:
    """Write `stem`.md for readers and `stem`.json for programs; returns the Markdown file."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine.as_dict(), "settings": settings, "figures": figures}
    (folder / f"{stem}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    listed = ", ".join(f"{name} {value}" for name, value in settings.items())
    parts = [
        f"# {title}",
        "\n".join(f"- {line}" for line in [*machine_lines(machine), f"Settings: {listed}"]),
        *(grid.markdown() for grid in grids),
    ]
    page = folder / f"{stem}.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page
