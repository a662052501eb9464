"""The whole life cycle in one go, with progress: distil, train, calibrate, evaluate, register, promote. Serves nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipelines import calibrate, distill, evaluate, promote, register, train
from pipelines.cluster import ray_session
from pipelines.config import Config
from pipelines.errors import PromotionRefused
from pipelines.report import Evaluation, terminal_table
from pipelines.stage import Progress, StageResult, Step, main

if TYPE_CHECKING:
    from rich.console import Console

Result = TypeVar("Result", bound=StageResult)


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
    with ray_session(config):
        _stage(console, "distil", distill.run, config, progress)
        _stage(console, "train", train.run, config, progress)
        _stage(console, "calibrate", calibrate.run, config, progress)
        measured = _stage(console, "evaluate", evaluate.run, config, progress)
        registered = _stage(console, "register", register.run, config, progress)
        refusal: str | None = None
        try:
            _stage(console, "promote", promote.run, config, progress)
        except PromotionRefused as refused:
            refusal = str(refused)
            console.print(f"[yellow]promote[/] {refusal}")
    console.print(terminal_table(measured.evaluation))
    return DemoResult(
        checkpoint=config.layout.checkpoint,
        report=measured.report,
        plot=measured.plot,
        evaluation=measured.evaluation,
        version=registered.version,
        refusal=refusal,
    )


def _stage(
    console: Console, name: str, stage: Callable[[Config, Progress], Result], config: Config, watch: Progress | None
) -> Result:
    with _bar(console, name) as advance:

        def tell(step: Step) -> None:
            advance(step)
            if watch is not None:
                watch(step)

        result = stage(config, tell)
    console.print(f"[green]✓[/] [bold]{name}[/] {result.summary}", highlight=False)
    return result


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
