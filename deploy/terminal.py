"""What the terminal shows: streamed answers, progress, tables. Knows rich; decodes nothing and serves nothing."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from medusa.generate import Chunk, Generation
    from medusa.request import Stats
    from pipelines.listing import Entry
    from pipelines.stage import Step

# Neighbouring steps differ; a run of one colour is what one step accepted.
STEP_STYLES = ("cyan", "yellow", "green", "magenta")


def write_stream(chunks: Iterable[Chunk], out: TextIO) -> Generation:
    """Print an answer as it comes, the tokens of one step coloured alike where `out` is a terminal; the whole of it."""
    console = Console(file=out, highlight=False, soft_wrap=True)
    generation = None
    for chunk in chunks:
        if chunk:
            style = STEP_STYLES[chunk.step % len(STEP_STYLES)] if console.is_terminal else None
            console.out(chunk, style=style, end="", highlight=False)
            out.flush()
        generation = chunk.generation or generation
    console.out("")
    assert generation is not None, "a stream ends with its generation"
    return generation


def stats_line(stats: Stats) -> str:
    """One line under an answer: how fast, and how much of it came free."""
    rate = f", {stats.acceleration_rate:.2f} tokens a step" if stats.acceleration_rate is not None else ""
    return f"{stats.num_tokens} tokens, {stats.tokens_per_s:.1f} tokens/s{rate}, first after {stats.prefill_s:.2f} s"


def facts_table(title: str, facts: Iterable[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in facts:
        table.add_row(name, value)
    return table


def versions_table(entries: Sequence[Entry]) -> Group:
    """The registry's versions, as `pipelines.listing` tells of them; what the gate said of each below, a line or more."""
    table = Table(title="Registered versions", title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    for name in ("version", "alias", "created", "nodes", "rate", "speedup", "same", "ppl"):
        table.add_column(name, overflow="fold")
    for entry in entries:
        found = entry.evaluation
        quality = found.quality if found else None
        table.add_row(
            str(entry.version),
            ", ".join(entry.aliases),
            entry.created,
            str(found.num_nodes) if found else "–",
            f"{found.acceleration_rate:.2f}" if found else "–",
            f"{found.speedup:.2f}×" if found else "–",
            f"{found.identity_checked - found.identity_differing}/{found.identity_checked}" if found else "–",
            f"{max(quality.answers.rise, quality.text.rise):+.2%}" if quality else "–",
        )
    return Group(table, *(Text(f"version {entry.version}: {entry.verdict}") for entry in entries))


@contextlib.contextmanager
def stage_progress(name: str) -> Iterator[Callable[[Step], None]]:
    """A bar on stderr for the time of one stage; lines of its log pass above it. Plain log lines where there is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda step: logging.getLogger(__name__).info("%s: %d of %d %s", name, step.done, step.total, step.note)
        return
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True) as bar:
        task = bar.add_task(name, total=None, note="")
        yield lambda step: bar.update(task, completed=step.done, total=step.total, note=step.note)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Our own log as plain lines on stderr, other people's from warnings up: stdout carries answers alone."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for package in ("medusa", "pipelines", "deploy"):
        logging.getLogger(package).setLevel(level)


def quiet() -> None:
    """Ours is the only voice on stderr, as lines of text; other libraries speak from warnings up."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    log_to_stderr()
