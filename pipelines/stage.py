"""How a stage is run: `python -m pipelines.<stage> --config FILE key=value …`, and how it tells of its progress."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from medusa.errors import MedusaError
from pipelines.config import Config, load_config
from pipelines.errors import StageFailed

logger = logging.getLogger(__name__)

POLL_S = 1.0


class StageResult(Protocol):
    """What every stage returns: its own facts, and one line that tells them."""

    @property
    def summary(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where a stage is: `done` of `total` units, and a few words."""

    done: int
    total: int
    note: str = ""


Progress = Callable[[Step], None]


def ignore_progress(step: Step) -> None:
    """For callers that do not watch."""


@contextlib.contextmanager
def polled(read: Callable[[], Step], progress: Progress, *, interval_s: float = POLL_S) -> Iterator[None]:
    """While the block works elsewhere (Ray's workers), tell `progress` what `read` sees and has not told, from a thread.

    A reading that fails is skipped: watching never stops the work.
    """
    stop = threading.Event()

    def watch() -> None:
        told = None
        while not stop.wait(interval_s):
            try:
                if (step := read()) != told:
                    progress(step)
                    told = step
            except Exception:
                logger.debug("progress could not be read", exc_info=True)

    watcher = threading.Thread(target=watch, name="progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def unrepeated(progress: Progress) -> Progress:
    """Tells a step only where it is not the one that was told before."""
    told: Step | None = None

    def tell(step: Step) -> None:
        nonlocal told
        if step != told:
            told = step
            progress(step)

    return tell


def log_progress(step: Step) -> None:
    logger.info("%d of %d %s", step.done, step.total, step.note)


def _terminate(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)


def quiet_libraries() -> None:
    for noisy in ("alembic", "mlflow", "ray.data", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def main(name: str, run: Callable[[Config, Progress], StageResult], argv: Sequence[str] | None = None) -> None:
    """Command line of one stage. Exit code 0, 130 for Ctrl-C, 2 for an error that the user can mend: one line that names
    the stage.

    SIGTERM, which stops a submitted job, unwinds: what was started is stopped, the tracked run ends as failed.
    """
    from pipelines.cluster import run_stage

    parser = argparse.ArgumentParser(
        prog=f"python -m pipelines.{name}", description=sys.modules[run.__module__].__doc__
    )
    parser.add_argument("--config", type=Path, help="YAML file, or the name of a shipped one (laptop, demo, cluster)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_libraries()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        config: Config = load_config(arguments.config, arguments.overrides)
        print(run_stage(name, run, config, log_progress).summary)  # noqa: T201
    except (MedusaError, ValueError, OSError) as error:
        logger.debug("stage failed", exc_info=True)
        told = " ".join(str(error).split())
        print(f"error: {told if isinstance(error, StageFailed) else f'{name} failed: {told}'}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
