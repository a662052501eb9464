"""One run at a time in a folder, over processes and machines that mount it. Knows a lock file, not what is done meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from pipelines.errors import StageError

_TIMEOUT_S = 5.0


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Nobody else who asks so is at work in `folder` meanwhile. StageError where somebody is, after a few seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=_TIMEOUT_S):
            yield
    except Timeout:
        raise StageError(f"another run is at work in {folder}; wait for it, or use another workdir") from None
