"""The whole life cycle in one go, shown on a terminal: `run`, with bars and a table at the end. Serves nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import run as life_cycle
from pipelines.config import Config, RunSection
from pipelines.report import Evaluation, terminal_table
from pipelines.stage import Progress, Step, main

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the way through made. `refusal` says why the gate kept the new version from being champion, if it did."""

    checkpoint: Path
    report: Path
    plot: Path
    evaluation: Evaluation
    version: int
    refusal: str | None

    @property
    def promoted(self) -> bool:
        return self.refusal is None

    @property
    def summary(self) -> str:
        role = "champion" if self.promoted else "challenger"
        return f"version {self.version} is {role}: {self.evaluation.headline}; report in {self.report}"


def run(config: Config, progress: Progress | None = None, *, console: Console | None = None) -> DemoResult:
    """All stages over one working directory, in one Ray, which is stopped at the end however it comes.

    Run again it goes on where it stopped. A challenger that the gate refuses is no error: the champion stays.
    `progress` sees every stage's steps beside the bars on `console`.
    """
    from rich.console import Console as RichConsole

    console = console or RichConsole(stderr=True)

    @contextlib.contextmanager
    def watch(name: str) -> Iterator[Progress]:
        with _bar(console, name) as advance:

            def tell(step: Step) -> None:
                advance(step)
                if progress is not None:
                    progress(step)

            yield tell

    def done(name: str, summary: str) -> None:
        console.print(f"[green]✓[/] [bold]{name}[/] {summary}", highlight=False)

    made = life_cycle.run(config.model_copy(update={"run": RunSection()}), watch=watch, done=done)
    assert made.evaluate is not None
    assert made.register is not None
    console.print(terminal_table(made.evaluate.evaluation))
    return DemoResult(
        checkpoint=config.layout.checkpoint,
        report=made.evaluate.report,
        plot=made.evaluate.plot,
        evaluation=made.evaluate.evaluation,
        version=made.register.version,
        refusal=made.refusal,
    )


@contextlib.contextmanager
def _bar(console: Console, name: str) -> Iterator[Progress]:
    """A transient progress bar; gone when the stage ends."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    name_and_note = TextColumn("[bold]{task.description}"), TextColumn("{task.fields[note]}")
    columns = (name_and_note[0], BarColumn(), MofNCompleteColumn(), name_and_note[1], TimeElapsedColumn())
    with RichProgress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(name, total=None, note="")

        def advance(step: Step) -> None:
            bars.update(task, completed=step.done, total=step.total, note=step.note)

        yield advance


if __name__ == "__main__":
    main("demo", run)
