"""What a failure means, read from what it says: whoever was killed could not explain it himself. Pure.

Ray carries a worker's failure as text, and each library says "the disk is full" in its own words.
"""

from __future__ import annotations

import errno
import os

_FULL_DISK = {
    "No space left on device": "the disk is full; free some space",
    "database or disk is full": "the disk is full; free some space",  # SQLite
    "PytorchStreamWriter failed writing file": "the disk is full; free some space",  # torch.save, in three ways
    "basic_ios::clear: iostream error": "the disk is full; free some space",
    ". unexpected pos ": "the disk is full; free some space",
    "Disk quota exceeded": "the disk quota is used up; free some space",
}
_SHORT_OF_MEMORY = (
    "OutOfMemoryError",  # Ray's own watch, and torch on a GPU
    "low on memory",
    "can't allocate memory",  # torch on a CPU
    "MemoryError",
)
_KILLED = "SIGKILL by OOM killer"  # the first cause that Ray thinks of where a process ended without a word


def meaning(text: str, *, lower: str) -> str | None:
    """What `text` says in a few words, with what to do; `lower` names the settings that memory depends on. None: unknown."""
    for sign, said in _FULL_DISK.items():
        if sign in text:
            return said
    if any(sign in text for sign in _SHORT_OF_MEMORY):
        return f"a worker ran out of memory; lower {lower}"
    if _KILLED in text:
        return f"a worker was killed; if its node ran out of memory, lower {lower}"
    return None


def full_disk(error: BaseException) -> str | None:
    """What to do, where an error or one that caused it says that a disk is full; None for any other."""
    seen: BaseException | None = error
    while seen is not None:
        said = next((said for sign, said in _FULL_DISK.items() if sign in str(seen)), None)
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            said = _FULL_DISK[os.strerror(seen.errno)]
            return f"{said} where {seen.filename} lies" if seen.filename else said
        if said is not None:
            return said
        seen = seen.__cause__ or seen.__context__
    return None
