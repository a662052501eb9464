"""A folder written whole or not at all. Knows the file system; knows nothing of what is in the folder."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ABANDONED_S = 24 * 3600.0  # no writer pauses so long


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """An empty folder to write into; it becomes `target` when the block ends, and is gone if the block raises.

    An existing `target` is replaced, and stays as it was where that fails. What a writer had just taken away when it was
    killed is put back first, and what it left half-written is deleted when it has not been touched for a day. Whoever may
    read the folder may read what is in it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _put_back(target)
    _delete_abandoned(target)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as work:
        made, old = Path(work) / "made", Path(work) / "old"
        made.mkdir()
        yield made
        for path in made.rglob("*"):  # safetensors writes for its owner alone
            if path.is_symlink():
                continue
            mode = path.stat().st_mode
            wanted = mode | made.stat().st_mode & (0o555 if path.is_dir() else 0o444)
            if wanted != mode:  # not every file system lets modes be changed
                path.chmod(wanted)
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(made, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise


def _put_back(target: Path) -> None:
    """The old folder, where a writer was killed between taking it away and putting the new one in its place."""
    if not target.exists():
        for work in _work_folders(target):
            if (work / "old").exists():
                os.replace(work / "old", target)
                return


def _delete_abandoned(target: Path) -> None:
    """What killed writers left, once `_put_back` has had its pick: by age alone, since a writer may be on another machine."""
    for work in _work_folders(target):
        with suppress(OSError):  # its writer finishes
            touched = max(path.lstat().st_mtime for path in (work, *work.rglob("*")))
            if time.time() - touched > _ABANDONED_S and {path.name for path in work.iterdir()} <= {"made", "old"}:
                shutil.rmtree(work, ignore_errors=True)


def _work_folders(target: Path) -> list[Path]:
    """Of all writers of `target`. Of eight random characters, so none of another target's: `.name-more-xxxxxxxx`."""
    return list(target.parent.glob(f".{glob.escape(target.name)}-{'?' * 8}/"))
