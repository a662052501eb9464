"""Who works in a folder alone and who reads it, over processes and machines that mount it. Knows a lock file, not what is
done meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from pipelines.errors import StageError

_NAME = ".lock"
_MODE = 0o666  # whoever may write into the folder may lock it, not only who came first
_TIMEOUT_S = 5.0
_POLL_S = 0.05


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Nobody else who asks so is at work in `folder` meanwhile, and nobody reads it as `settled`. StageError where somebody
    does, after a few seconds, or where one may not lock it."""
    lock = FileLock(folder / _NAME, timeout=_TIMEOUT_S, mode=_MODE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock.acquire()
    except Timeout:
        raise _busy(folder) from None
    except PermissionError:
        raise StageError(
            f"{folder / _NAME} may not be written; have its owner allow it (chmod a+rw), or use another workdir"
        ) from None
    with held:
        yield


@contextlib.contextmanager
def settled(folder: Path) -> Iterator[None]:
    """Nobody is `alone_in` the folder meanwhile; any number may read it at once. StageError where somebody is, after a few
    seconds.

    Where one may not open the lock, or the file system has none, the folder is read without it.
    """
    with contextlib.ExitStack() as stack:
        try:
            lock: int | None = os.open(folder / _NAME, os.O_RDONLY)
        except FileNotFoundError:
            lock = _created(folder / _NAME)
        except PermissionError:
            lock = None
        if lock is not None:
            stack.callback(os.close, lock)
            _share(lock, folder)
        yield


def _created(file: Path) -> int | None:
    """A descriptor of the new lock file; None where it cannot be made, the folder being absent or not ours to write into."""
    if not file.parent.is_dir():  # filelock would make it
        return None
    with contextlib.suppress(OSError), FileLock(file, timeout=_TIMEOUT_S, mode=_MODE):
        return os.open(file, os.O_RDONLY)
    return None


def _share(lock: int, folder: Path) -> None:
    """Hold it beside other readers, until it is closed: filelock knows exclusive locks alone."""
    give_up = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # what `flock` says of a lock that is held
            pass
        except OSError:  # no locks on this file system
            return
        else:
            return
        if time.monotonic() > give_up:
            raise _busy(folder)
        time.sleep(_POLL_S)


def _busy(folder: Path) -> StageError:
    return StageError(f"another run is at work in {folder}; wait for it, or use another workdir")
