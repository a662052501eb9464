"""Who works in a folder alone, who reads it, and whose lock file it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout

from pipelines import folder_lock
from pipelines.errors import StageError
from pipelines.folder_lock import alone_in, settled


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "_TIMEOUT_S", 0.05)


def test_readers_share_a_folder_and_keep_out_who_works_in_it_alone(tmp_path: Path) -> None:
    busy = pytest.raises(StageError, match=f"another run is at work in {tmp_path}; wait")
    with settled(tmp_path), settled(tmp_path), busy, alone_in(tmp_path):
        pass
    for refused in (alone_in, settled):
        with alone_in(tmp_path), busy, refused(tmp_path):
            pass
    with settled(tmp_path):
        pass


def test_who_may_write_into_the_folder_may_lock_it_whoever_came_first(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        for folder, lock in ((tmp_path / "worked", alone_in), (tmp_path / "read", settled)):
            folder.mkdir()
            with lock(folder):
                assert (folder / ".lock").stat().st_mode & 0o777 == 0o666
    finally:
        os.umask(before)


def test_a_lock_that_one_may_not_open_stops_those_who_write_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with alone_in(tmp_path):
        pass
    opened = os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path).name == ".lock":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with settled(tmp_path):
        pass
    with pytest.raises(StageError, match=r"\.lock may not be written; .*\(chmod a\+rw\)"), alone_in(tmp_path):
        pass


def test_a_folder_that_is_not_there_is_not_made_by_reading_it(tmp_path: Path) -> None:
    with settled(tmp_path / "absent"):
        assert not (tmp_path / "absent").exists()


def test_a_lock_that_is_held_elsewhere_meanwhile_is_not_this_ones(tmp_path: Path) -> None:
    with pytest.raises(Timeout), alone_in(tmp_path), FileLock(tmp_path / "other"):
        FileLock(tmp_path / "other", timeout=0).acquire()
