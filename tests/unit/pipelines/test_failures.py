from __future__ import annotations

import errno
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch

from pipelines.cluster import run_stage
from pipelines.config import Config
from pipelines.errors import ConfigError, StageError
from pipelines.failures import full_disk, meaning
from pipelines.stage import Progress, StageResult

RAYS_GUESS = (
    "The actor died unexpectedly before finishing this task.\n Worker exit detail: Worker unexpectedly exits with a "
    "connection error code 2. End of file. Some common causes include: (1) the process was killed by SIGKILL by OOM killer "
    "due to high memory usage. (2) ray stop --force is called."
)
FULL_DEVICE = Path("/dev/full")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "OSError: [Errno 28] Error writing bytes. Detail: No space left on device",
            "the disk is full; free some space",
        ),
        ("(sqlite3.OperationalError) database or disk is full", "the disk is full; free some space"),
        ("ray.exceptions.OutOfMemoryError: Task was killed", "a worker ran out of memory; lower this"),
        ("DefaultCPUAllocator: can't allocate memory: you tried to", "a worker ran out of memory; lower this"),
        (RAYS_GUESS, "a worker was killed; if its node ran out of memory, lower this"),
        ("ValueError: shapes do not fit", None),
    ],
)
def test_what_is_said_somewhere_is_told_in_a_few_words(text: str, said: str | None) -> None:
    assert meaning(text, lower="this") == said


def write_text() -> None:
    FULL_DEVICE.write_text("x" * 100_000)


def save_tensor() -> None:
    torch.save(torch.zeros(100_000), FULL_DEVICE)


def quota() -> None:
    raise OSError(errno.EDQUOT, "Disk quota exceeded", "answers.parquet")


def insert() -> None:
    with sqlite3.connect(":memory:") as database:
        database.execute("pragma max_page_count = 2")
        database.execute("create table t (x)")
        database.executemany("insert into t values (?)", [("x" * 1000,)] * 100)


def copy() -> None:
    raise shutil.Error([("made/heads.safetensors", "checkpoint", "[Errno 28] No space left on device")])


def behind_another() -> None:
    try:
        write_text()
    except OSError as error:
        raise RuntimeError("the artifact was not stored") from error


@pytest.mark.skipif(not FULL_DEVICE.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("write", [write_text, save_tensor, quota, insert, copy, behind_another])
def test_a_stage_that_meets_a_full_disk_ends_in_one_line(write: object, tmp_path: Path) -> None:
    def stage(config: Config, progress: Progress) -> StageResult:
        write()  # type: ignore[operator]
        raise AssertionError("the disk was not full")

    with pytest.raises(StageError, match=r"free some space.* run this again") as caught:
        run_stage("distill", stage, Config(workdir=tmp_path), lambda _: None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [ValueError("no"), OSError(errno.ENOENT, "No such file"), ConfigError("no such key")])
def test_other_failures_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    def stage(config: Config, progress: Progress) -> StageResult:
        raise error

    assert full_disk(error) is None
    with pytest.raises(type(error)) as caught:
        run_stage("distill", stage, Config(workdir=tmp_path), lambda _: None)
    assert caught.value is error
