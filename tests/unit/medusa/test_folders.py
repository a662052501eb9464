from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from medusa import folders
from medusa.folders import whole_folder


def _text(folder: Path) -> str:
    return (folder / "text").read_text()


def test_a_folder_is_replaced_by_what_was_written(tmp_path: Path) -> None:
    for said in ("old", "new"):
        with whole_folder(tmp_path / "made") as folder:
            (folder / "text").write_text(said)
    assert _text(tmp_path / "made") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_whoever_may_read_the_folder_may_read_what_is_in_it(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "made") as folder:
        (folder / "deep").mkdir(mode=0o700)
        (folder / "nowhere").symlink_to("gone")
        for path in (folder / "text", folder / "deep" / "text"):
            path.write_text("new")
            path.chmod(0o600)
        folder.chmod(0o750)
    for path in (tmp_path / "made" / "text", tmp_path / "made" / "deep" / "text"):
        assert path.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "made" / "deep").stat().st_mode & 0o777 == 0o750


def test_what_killed_writers_left_is_deleted_when_nobody_can_be_writing_it_any_more(tmp_path: Path) -> None:
    def left(name: str, *, part: str = "made", touched_h: float = 0.0) -> str:
        work = tmp_path / name
        (work / part / "deep").mkdir(parents=True)
        (work / part / "deep" / "text").write_text("torn")
        for path in (work, *work.rglob("*")):
            os.utime(path, (time.time() - 90_000,) * 2)
        os.utime(work / part / "deep" / "text", (time.time() - 3600 * touched_h,) * 2)
        return name

    left(".made-abcd_123", touched_h=25)
    left(".made-abcd_124", part="old", touched_h=25)
    (tmp_path / "made").mkdir()
    kept = {
        "made",
        left(".made-abcd_125", touched_h=23),
        left(".made-more-abcd_123", touched_h=25),
        left(".made-settings", part="own", touched_h=25),
    }
    with whole_folder(tmp_path / "made") as folder:
        (folder / "text").write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("fails", ["the block", "the last move"])
def test_a_folder_that_could_not_be_replaced_stays_as_it_was(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "made"
    target.mkdir()
    (target / "text").write_text("old")
    move = os.replace

    def replace(source: Path, to: Path) -> None:
        if fails == "the last move" and source.name == "made" and to == target:
            raise OSError("the disk is gone")
        move(source, to)

    def write() -> None:
        with whole_folder(target) as folder:
            (folder / "text").write_text("new")
            if fails == "the block":
                raise OSError("the disk is gone")

    monkeypatch.setattr(folders.os, "replace", replace)
    with pytest.raises(OSError, match="the disk is gone"):
        write()
    assert _text(target) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
