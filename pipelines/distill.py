"""Self-distillation: the backbone answers prompts on a Ray Data actor pool, into Parquet. Knows no training.

Whatever kills it, a rerun answers only what is missing (see `pool`), or asked otherwise now (see `records.align`). One
MLflow run tells of the job, over all reruns.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.answering import Answerer, prompt_table
from pipelines.capacity import Need, require
from pipelines.cluster import ray_session
from pipelines.config import Config
from pipelines.errors import ConfigError
from pipelines.job_log import JobLog
from pipelines.pool import Pool, Watch
from pipelines.prompts import Prompt, prompt_digest, prompt_parts
from pipelines.records import CALIBRATION, TRAIN, UNUSED, align, answer_files, same_sampling, sampling_key, scan
from pipelines.self_prompt import self_prompts
from pipelines.stage import Progress, Step, ignore_progress, main

logger = logging.getLogger(__name__)

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
    tokens_per_s: float | None
    finish_reasons: dict[str, int]

    @property
    def summary(self) -> str:
        failed = f", {self.num_failed} failed: see the error column, distill.retry_errors=true asks them again"
        speed = "" if self.tokens_per_s is None else f" at {self.tokens_per_s:.0f} tokens/s"
        reasons = ", ".join(f"{name} {count}" for name, count in sorted(self.finish_reasons.items()))
        return (
            f"{self.num_answers} answers, {self.num_tokens} tokens in {self.folder} "
            f"(prompts: {self.num_asked} asked now{speed}, {self.num_done_before} before; {reasons or 'no answer'}"
            f"{failed if self.num_failed else ''})"
        )


def run(config: Config, progress: Progress = ignore_progress) -> DistillResult:
    """Answer every prompt that has no answer yet. Raises ConfigError, PromptError, StageError."""
    pool = Pool(
        folder=config.layout.distilled,
        key="prompt_id",
        worker=Answerer,
        args=(config.backbone, config.distill),
        settings=config.distill,
    )
    wanted = _wanted(config, progress)
    with pool.alone():
        known = pool.done()
        written_by = _refuse_other_settings(pool.folder, config)
        aligned = align(pool.folder, {prompt.id: (prompt_digest(prompt), part) for prompt, part in wanted})
        retried = {key for key, failed in known.items() if failed and config.distill.retry_errors}
        done = known.keys() - aligned.edited - retried
        missing = [asked for asked in wanted if asked[0].id not in done]
        pool = replace(pool, args=(*pool.args, written_by))
        progress(Step(done=len(wanted) - len(missing), total=len(wanted), note="prompts"))
        if missing or aligned.changed:
            watch, tally = _answer(missing, len(wanted), pool, config, progress)
        else:
            watch, tally = None, _tally(pool.folder)
    return _result(pool.folder, wanted, missing, watch, tally)


def _wanted(config: Config, progress: Progress) -> list[Asked]:
    own = self_prompts(config, progress) if config.prompts.self_prompt.num else ()
    parts = prompt_parts(config.prompts, own)
    return [(p, TRAIN) for p in parts.train] + [(p, CALIBRATION) for p in parts.calibration]


def _refuse_other_settings(folder: Path, config: Config) -> str | None:
    """ConfigError where the folder was made with other settings than those asked for; the backbone that wrote it, if any."""
    asked_now, written_by = sampling_key(config.distill, config.backbone.decodes_in), None
    for row in scan(folder, ["sampling", "backbone"]):
        written_by = row["backbone"]
        if not same_sampling(row["sampling"], asked_now):
            raise ConfigError(
                f"{folder} holds answers made with {row['sampling']}, asked for is {asked_now}; use another workdir, or remove it"
            )
    return written_by


def _answer(
    missing: list[Asked], total: int, pool: Pool, config: Config, progress: Progress
) -> tuple[Watch | None, _Tally]:
    """Who watched, if anything was missing, and what the folder holds then, of which MLflow is told."""
    before = _tally(pool.folder, without={prompt.id for prompt, _ in missing})
    with JobLog(config, f"distill-{_job(pool.folder)}", _params(config, total)) as log:

        def tell(num_tokens: int, turns: Counter[str]) -> None:
            counts = {"tokens": num_tokens} | {f"finish_{name}": turns[name] for name in ("stop", "length", "error")}
            # MLflow shows the metrics of the highest step, so prompts that fell out of use go on counting.
            speed = {"tokens_per_s": watch.tokens_per_s} if missing else {}
            log.metrics(counts | speed, step=before.num_unused + watch.done)

        def told(step: Step) -> None:
            progress(step)
            tell(before.num_tokens + watch.tokens, before.turns + watch.reasons)

        watch = Watch(told, key="prompt_id", done_before=total - len(missing), total=total, clock=time.monotonic)
        if missing:
            with ray_session(config):
                require(config, actors_needed(config, len(missing)))
                pool.run(prompt_table(missing), watch)
        after = _tally(pool.folder)
        tell(after.num_tokens, after.turns)
    return watch if missing else None, after


def actors_needed(config: Config, num_prompts: int) -> Need:
    """What the actor pool holds of the cluster. The tasks that feed it run between its shares."""
    settings = config.distill
    each = {"CPU": settings.cpus_per_actor}
    if settings.gpus_per_actor:
        each = {"GPU": settings.gpus_per_actor}
    return Need(
        what="distillation actors",
        count=min(settings.num_actors, num_prompts),
        each=each,
        lower="distill.num_actors, distill.cpus_per_actor or distill.gpus_per_actor",
    )


def _job(folder: Path) -> str:
    """Names the job of a folder, for every run that works on it."""
    file = folder / ".job"
    if not file.is_file():
        file.write_text(uuid.uuid4().hex[:12], encoding="ascii")
    return file.read_text(encoding="ascii").strip()


def _params(config: Config, total: int) -> dict[str, Any]:
    settings = config.distill.model_dump(mode="json", exclude={"retry_errors"})
    return {"backbone": config.backbone.name, "num_prompts": total} | {f"distill.{k}": v for k, v in settings.items()}


@dataclass(frozen=True, kw_only=True)
class _Tally:
    """What the answers of a folder come to: `turns` by their ending, "error" among them; prompts out of use beside them."""

    num_tokens: int
    turns: Counter[str]
    num_unused: int


def _tally(folder: Path, *, without: Container[str] = ()) -> _Tally:
    """Of all prompts in use but some."""
    num_tokens, turns, unused = 0, Counter[str](), set()
    for row in scan(folder, ["prompt_id", "part", "response_ids", "finish_reason", "error"]):
        if row["part"] == UNUSED:
            unused.add(row["prompt_id"])
        elif row["prompt_id"] not in without:
            turns[row["finish_reason"] if row["error"] is None else "error"] += 1
            num_tokens += len(row["response_ids"])
    return _Tally(num_tokens=num_tokens, turns=turns, num_unused=len(unused))


def _result(
    folder: Path, wanted: list[Asked], missing: list[Asked], watch: Watch | None, tally: _Tally
) -> DistillResult:
    assert answer_files(folder) or not wanted
    reasons = tally.turns
    failed = reasons.pop("error", 0)
    return DistillResult(
        folder=folder,
        num_asked=len(missing),
        num_done_before=len(wanted) - len(missing),
        num_failed=failed,
        num_answers=reasons.total(),
        num_tokens=tally.num_tokens,
        tokens_per_s=watch.tokens_per_s if watch else None,
        finish_reasons=dict(reasons),
    )


if __name__ == "__main__":
    main("distill", run)
