"""Self-distillation: the backbone answers prompts on a Ray Data actor pool, into Parquet. Knows no training.

An answer is committed by renaming a whole file into the folder, so a file there is complete. A rerun answers only what
is missing, and first takes over the complete files of a run that died.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from pipelines.answering import Answerer, prompt_table
from pipelines.capacity import Need, require
from pipelines.cluster import ray_session
from pipelines.config import Config
from pipelines.errors import ConfigError, StageError
from pipelines.prompts import Prompt, prompt_parts
from pipelines.records import CALIBRATION, TRAIN, answer_files, sampling_key, scan
from pipelines.stage import Progress, Step, ignore_progress, main, polled

logger = logging.getLogger(__name__)

_RUN = ".run-"  # folders of runs under way; hidden from `answer_files`
_LOCK_TIMEOUT_S = 5.0

Asked = tuple[Prompt, str]


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """What this run did, and what the folder now holds."""

    folder: Path
    num_asked: int
    num_done_before: int
    num_failed: int
    num_answers: int
    num_tokens: int

    @property
    def summary(self) -> str:
        failed = f", {self.num_failed} failed (see the error column)" if self.num_failed else ""
        return (
            f"{self.num_answers} answers, {self.num_tokens} tokens in {self.folder} "
            f"({self.num_asked} prompts asked now, {self.num_done_before} were done{failed})"
        )


def run(config: Config, progress: Progress = ignore_progress) -> DistillResult:
    """Answer every prompt that has no answer yet. Raises ConfigError, PromptError, StageError."""
    parts = prompt_parts(config.prompts)
    wanted: list[Asked] = [(p, TRAIN) for p in parts.train] + [(p, CALIBRATION) for p in parts.calibration]
    folder = config.layout.distilled
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=_LOCK_TIMEOUT_S):
            adopt(folder)
            done = _done(folder, config)
            missing = [asked for asked in wanted if asked[0].id not in done]
            progress(Step(done=len(wanted) - len(missing), total=len(wanted), note="prompts"))
            if missing:
                with ray_session(config):
                    _answer(missing, folder, config, progress)
    except Timeout:
        raise StageError(f"another distillation is writing to {folder}; wait for it, or use another workdir") from None
    return _result(folder, wanted, missing)


def adopt(folder: Path) -> int:
    """Commit the complete files of runs that died, drop the torn ones; how many rows were saved."""
    saved = 0
    for run_folder in sorted(folder.glob(f"{_RUN}*")):
        for file in sorted(run_folder.glob("*.parquet")):
            try:
                rows = pq.read_metadata(file).num_rows  # the footer is written last
            except (pa.ArrowInvalid, OSError):
                logger.warning("%s was cut off while it was written; its prompts are asked again", file.name)
                continue
            saved += rows
            _commit(file, folder, run_folder.name.removeprefix(_RUN))
        shutil.rmtree(run_folder)
    return saved


def _done(folder: Path, config: Config) -> set[str]:
    """Ids of the prompts that need no answer. Raises ConfigError when the folder was made with other settings."""
    asked_now, done, failed = sampling_key(config.distill), set(), set()
    for row in scan(folder, ["prompt_id", "sampling", "error"]):
        if row["sampling"] != asked_now:
            raise ConfigError(
                f"{folder} holds answers made with {row['sampling']}, asked for is {asked_now}; use another workdir, or remove it"
            )
        done.add(row["prompt_id"])
        if row["error"] is not None:
            failed.add(row["prompt_id"])
    return done - failed if config.distill.retry_errors else done


def _answer(missing: list[Asked], folder: Path, config: Config, progress: Progress) -> None:
    """Run the actor pool over `missing`, a block of `rows_per_file` prompts at a time, and commit its files."""
    import ray.data
    from ray.data import SaveMode

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # `progress` tells what is under way
    settings = config.distill
    require(config, actors_needed(config, len(missing)))
    run_folder = folder / f"{_RUN}{uuid.uuid4().hex[:8]}"
    run_folder.mkdir()
    size = settings.rows_per_file
    blocks = [prompt_table(missing[start : start + size]) for start in range(0, len(missing), size)]
    answers = ray.data.from_arrow(blocks).map_batches(
        Answerer,
        fn_constructor_args=(config.backbone, settings),
        batch_format="pyarrow",
        batch_size=size,
        compute=ray.data.ActorPoolStrategy(size=min(settings.num_actors, len(blocks))),
        num_cpus=settings.cpus_per_actor if not settings.gpus_per_actor else None,
        num_gpus=settings.gpus_per_actor or None,
    )

    def written() -> Step:
        rows = sum(pq.read_metadata(file).num_rows for file in run_folder.glob("*.parquet"))
        return Step(done=min(rows, len(missing)), total=len(missing), note="prompts")

    with polled(written, progress):
        answers.write_parquet(str(run_folder), mode=SaveMode.APPEND)
    adopt(folder)
    progress(Step(done=len(missing), total=len(missing), note="prompts"))


def actors_needed(config: Config, num_prompts: int) -> Need:
    """What the actor pool holds of the cluster. The tasks that feed it run between its shares."""
    settings = config.distill
    each = {"CPU": settings.cpus_per_actor}
    if settings.gpus_per_actor:
        each = {"GPU": settings.gpus_per_actor}
    return Need(
        what="distillation actors",
        count=min(settings.num_actors, math.ceil(num_prompts / settings.rows_per_file)),
        each=each,
        lower="distill.num_actors, distill.cpus_per_actor or distill.gpus_per_actor",
    )


def _commit(file: Path, folder: Path, run_name: str) -> None:
    os.replace(file, folder / f"{run_name}-{file.name}")


def _result(folder: Path, wanted: list[Asked], missing: list[Asked]) -> DistillResult:
    answered: dict[str, int] = {}
    failed: set[str] = set()
    for row in scan(folder, ["id", "response_ids", "error"]):
        if row["error"] is None:
            answered[row["id"]] = len(row["response_ids"])
        else:
            failed.add(row["id"])
    assert answer_files(folder) or not wanted
    return DistillResult(
        folder=folder,
        num_asked=len(missing),
        num_done_before=len(wanted) - len(missing),
        num_failed=len(failed - answered.keys()),
        num_answers=len(answered),
        num_tokens=sum(answered.values()),
    )


if __name__ == "__main__":
    main("distill", run)
