"""The whole life cycle, or a part of it, in order and in one Ray: distil, train, calibrate, evaluate, register, promote.

Started again it goes on where it stopped: answers, training steps and measurements that are there are not made twice.
Knows the order of the stages, not what they do.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import get_args

from medusa.errors import MedusaError
from pipelines import calibrate, distill, evaluate, promote, register, train
from pipelines.calibrate import CalibrateResult
from pipelines.cluster import Result, ray_session, run_stage
from pipelines.config import Config, StageName
from pipelines.distill import DistillResult
from pipelines.errors import ConfigError, PromotionRefused, StageFailed
from pipelines.evaluate import EvaluateResult
from pipelines.promote import PromoteResult
from pipelines.register import RegisterResult
from pipelines.stage import Progress, Step, ignore_progress, main
from pipelines.train import TrainResult

logger = logging.getLogger(__name__)

STAGES: tuple[StageName, ...] = get_args(StageName)
Watch = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What each stage returned; None where it was left out, or, with a `refusal`, where the gate kept the champion."""

    distill: DistillResult | None = None
    train: TrainResult | None = None
    calibrate: CalibrateResult | None = None
    evaluate: EvaluateResult | None = None
    register: RegisterResult | None = None
    promote: PromoteResult | None = None
    refusal: str | None = None

    @property
    def summary(self) -> str:
        done = [name for name in STAGES if getattr(self, name) is not None]
        last = self.refusal or getattr(self, done[-1]).summary
        return f"{', '.join(done)} done; {last}"


def _log_done(name: str, summary: str) -> None:
    logger.info("%s: %s", name, summary)


def run(
    config: Config,
    progress: Progress = ignore_progress,
    *,
    watch: Watch | None = None,
    done: Callable[[str, str], None] = _log_done,
) -> RunResult:
    """The stages from `run.first` to `run.last`. A challenger that the gate refuses is no error: the champion stays.

    `watch(name)` opens what shows one stage's progress; without it `progress` is told of all, each by its name.
    `done(name, summary)` is told of what a stage made, and why the gate refused.
    Raises StageFailed, which names the stage.
    """
    first, last = STAGES.index(config.run.first), STAGES.index(config.run.last)
    if first > last:
        raise ConfigError(f"run.first {config.run.first} comes after run.last {config.run.last}; change them round")
    asked = STAGES[first : last + 1]
    watch = watch or named(progress)

    def go(name: StageName, stage: Callable[[Config, Progress], Result]) -> Result:
        made = _stage(name, stage, config, watch)
        done(name, made.summary)
        return made

    result = RunResult()
    with ray_session(config):
        if "distill" in asked:
            result = replace(result, distill=go("distill", distill.run))
        if "train" in asked:
            result = replace(result, train=go("train", train.run))
        if "calibrate" in asked:
            result = replace(result, calibrate=go("calibrate", calibrate.run))
        if "evaluate" in asked:
            result = replace(result, evaluate=go("evaluate", evaluate.run))
        if "register" in asked:
            result = replace(result, register=go("register", register.run))
        if "promote" in asked:
            try:
                result = replace(result, promote=go("promote", promote.run))
            except PromotionRefused as refused:
                result = replace(result, refusal=str(refused))
                done("promote", str(refused))
    return result


def _stage(name: StageName, stage: Callable[[Config, Progress], Result], config: Config, watch: Watch) -> Result:
    """One stage; its failure under its name."""
    try:
        with watch(name) as progress:
            return run_stage(name, stage, config, progress)
    except PromotionRefused:
        raise
    except (MedusaError, ValueError, OSError) as error:
        raise StageFailed(f"{name} failed: {error}") from error
    except Exception as error:
        error.add_note(f"in stage {name}; what was done before it is kept, run again to go on")
        raise


def named(progress: Progress) -> Watch:
    """One progress for all stages: each step carries its stage's name."""

    @contextlib.contextmanager
    def watch(name: str) -> Iterator[Progress]:
        yield lambda step: progress(Step(done=step.done, total=step.total, note=f"{step.note} ({name})"))

    return watch


if __name__ == "__main__":
    main("run", run)
