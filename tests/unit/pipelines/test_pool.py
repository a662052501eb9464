"""Exactly once, from files alone: what dead runs leave is adopted, what is there twice is settled, whenever one dies."""

from __future__ import annotations

import errno
import itertools
import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from pipelines import folder_lock
from pipelines import pool as pool_module
from pipelines.config import DistillSection
from pipelines.errors import StageError
from pipelines.pool import RUN, Pool, Watch, _one_line, adopt, settle
from pipelines.stage import Step

Row = tuple[str, str | None]


def _write(file: Path, *rows: Row, tokens: int = 2) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "key": pa.array([key for key, _ in rows], pa.string()),
        "error": pa.array([error for _, error in rows], pa.string()),
        "response_ids": pa.array([[1] * (0 if error else tokens) for _, error in rows], pa.list_(pa.int32())),
        "finish_reason": pa.array([None if error else "stop" for _, error in rows], pa.string()),
    }
    pq.write_table(pa.table(columns), file)


def _rows(folder: Path) -> list[Row]:
    return [
        (r["key"], r["error"]) for file in sorted(folder.glob("*.parquet")) for r in pq.read_table(file).to_pylist()
    ]


def _pool(folder: Path) -> Pool:
    return Pool(folder=folder, key="key", worker=object, args=(), settings=DistillSection())


def test_of_several_versions_one_stays_the_answered_before_the_failed(tmp_path: Path) -> None:
    _write(tmp_path / "a.parquet", ("x", None), ("y", "too long"), ("z", None))
    _write(tmp_path / "b.parquet", ("y", None), ("y", None), ("z", None), ("w", "bad"))
    _write(tmp_path / "c.parquet", ("x", None), ("w", "bad"))
    assert settle(tmp_path, "key") == {"x": False, "y": False, "z": False, "w": True}
    assert Counter(_rows(tmp_path)) == Counter([("x", None), ("y", None), ("y", None), ("z", None), ("w", "bad")])
    assert not (tmp_path / "c.parquet").exists()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    settle(tmp_path, "key")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("deaths", [1, 2, 3])
def test_a_death_while_settling_costs_nothing(deaths: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abcd":
        _write(tmp_path / f"{name}.parquet", ("x", None), ("y", "bad"), (name, None))
    replace, calls = os.replace, itertools.count(1)

    def dies(source: Path, target: Path) -> None:
        if next(calls) == deaths:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(pool_module.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        settle(tmp_path, "key")
    monkeypatch.undo()
    settle(tmp_path, "key")
    expected = [("x", None), ("y", "bad"), *((name, None) for name in "abcd")]
    assert Counter(_rows(tmp_path)) == Counter(expected)


def test_a_disk_that_is_full_while_settling_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "a.parquet", ("x", None), ("y", "bad"))
    _write(tmp_path / "b.parquet", ("y", None), ("z", None))
    before = _rows(tmp_path)

    def full(table: pa.Table, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):  # one line in `run_stage`
        settle(tmp_path, "key")
    assert _rows(tmp_path) == before
    monkeypatch.undo()
    settle(tmp_path, "key")
    assert Counter(_rows(tmp_path)) == Counter([("x", None), ("y", None), ("z", None)])


def test_what_a_worker_writes_after_its_run_was_adopted_is_not_there_twice(tmp_path: Path) -> None:
    _write(tmp_path / f"{RUN}dead" / "0.parquet", ("x", None))
    assert _pool(tmp_path).done() == {"x": False}
    _write(tmp_path / f"{RUN}dead" / "1.parquet", ("x", None), ("y", None))  # the orphan ends its work
    assert _pool(tmp_path).done() == {"x": False, "y": False}
    assert Counter(_rows(tmp_path)) == Counter([("x", None), ("y", None)])


def test_adopting_twice_saves_each_row_once(tmp_path: Path) -> None:
    _write(tmp_path / f"{RUN}dead" / "0.parquet", ("x", None), ("y", None))
    assert (adopt(tmp_path), adopt(tmp_path)) == (2, 0)


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "_TIMEOUT_S", 0.05)
    with FileLock(tmp_path / ".lock"), pytest.raises(StageError, match="another run"), _pool(tmp_path).alone():
        pass


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(StageError, match=r"x\.parquet"):
        settle(tmp_path, "key")


def test_the_watch_counts_each_complete_file_once(tmp_path: Path) -> None:
    now = [100.0]
    told: list[Step] = []
    watch = Watch(told.append, key="key", done_before=3, total=6, clock=lambda: now[0])
    assert watch.look(tmp_path) == Step(done=3, total=6, note="prompts")
    _write(tmp_path / "a.parquet", ("x", None), ("x", None), ("y", "bad"), tokens=10)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    now[0] = 104.0
    for _ in range(2):
        step = watch.look(tmp_path)
        now[0] += 1
    assert (step.done, step.total) == (5, 6)
    assert step.note == "prompts, 5 tokens/s (error 1, stop 2)"
    assert watch.reasons == {"stop": 2, "error": 1}
    drafts = Watch(told.append, key="key", done_before=0, total=6, clock=lambda: now[0], what="drafts")
    assert drafts.note == "drafts" and drafts.look(tmp_path).note.startswith("drafts, ")


def test_what_ray_carries_as_a_long_text_is_one_line() -> None:
    carried = RuntimeError("ray::MapWorker()\n  File x\npipelines.errors.StageError: too large; lower it\n\nThe above")
    assert str(_one_line(carried)) == "too large; lower it"
    full = RuntimeError("ray::Write()\nOSError: [Errno 28] Error writing bytes. Detail: No space left on device")
    assert "free some space" in str(_one_line(full))
    other = RuntimeError("something else")
    assert _one_line(other) is other
