"""What the measuring commands share: where results go, which trees a model offers, how an error is told."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import typer
from rich.console import Console

from benchmarks.prompts import Prompt
from medusa.dynamic_tree import DynamicTree
from medusa.errors import MedusaError
from medusa.generate import Model
from medusa.tree import Tree

RESULTS = Path(__file__).parent / "results"
console = Console()


def choose_trees(model: Model, choices: Sequence[str | int]) -> list[Tree | DynamicTree]:
    """The best tree of each size, or "dynamic:N"; without any the model's own. ValueError for what the heads cannot fill."""
    return [model.resolve_tree(choice) for choice in dict.fromkeys(choices)] or [model.tree]


def labelled(folders: Sequence[str]) -> dict[str, str]:
    """Label → folder of heads. Its name, or where several have one name the path as given, tells it apart."""
    different = list(dict.fromkeys(folders))
    named = Counter(Path(folder).name for folder in different)
    return {folder if named[Path(folder).name] > 1 else Path(folder).name: folder for folder in different}


def describe(backbone: str, dtype: str, rows: Sequence[Prompt], file: Path | None) -> dict[str, object]:
    """The settings that every result names; the folder of the prompts file is nobody's business."""
    prompts = f"{len(rows)} ({file.name if file else 'built-in'})"
    return {"backbone": backbone, "dtype": dtype, "prompts": prompts, "temperature": 0}


def run_command(command: Callable[..., None]) -> None:
    """A command line with one-line errors: exit code 2 for what the user can put right."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    run_app(app)


def run_app(app: typer.Typer) -> None:
    """The same for several commands."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        app()
    except (MedusaError, ValueError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None
