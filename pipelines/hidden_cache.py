"""Positions on disk: written once, memory-mapped by every epoch and every later run over the same rows. Knows files.

    {workdir}/hidden/{key}/lane-{i}-of-{L}.{field}.bin     one raw tensor each
A file appears under its name only when it is whole, so whatever a killed worker leaves is never read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from pipelines.errors import StageError
from pipelines.positions import Positions

logger = logging.getLogger(__name__)

GB = 1e9
VERSION = 2  # of what is kept: raised where the same rows and backbone would give other positions than before


def cache_key(*parts: object) -> str:
    """A name that two runs share exactly when they would keep the same positions."""
    return hashlib.sha256(json.dumps([VERSION, *map(str, parts)]).encode()).hexdigest()[:16]


def make_room(root: Path, key: str, *, num_bytes: int, quota_gb: float) -> None:
    """Delete what other keys keep, the oldest first, until `num_bytes` more fit the quota. Call it on one worker.

    What another run is writing at the moment is left alone.
    """
    others = [folder for folder in root.glob("*") if folder.is_dir() and folder.name != key and not _written(folder)]
    sizes = {folder: sum(file.stat().st_size for file in folder.glob("*")) for folder in others}
    for folder in sorted(others, key=lambda folder: folder.stat().st_mtime):
        if sum(sizes.values()) + num_bytes <= quota_gb * GB:
            return
        logger.info("hidden states of another run, %.1f GB, make room in %s", sizes[folder] / GB, root)
        shutil.rmtree(folder, ignore_errors=True)
        del sizes[folder]


def _written(folder: Path) -> bool:
    """Whether somebody writes a lane here."""
    try:
        for file in folder.glob("*.lock"):
            with FileLock(file, timeout=0):
                pass
    except Timeout:
        return True
    return False


def kept_on_disk(stem: Path, parts: Iterable[Positions], like: Positions, num_positions: int) -> Positions:
    """The positions of all `parts`, mapped from disk; written there first unless they are there already.

    `like` tells types and shapes. Raises StageError where the disk is too full.
    """
    shapes = {name: (num_positions, *value.shape[1:]) for name, value in vars(like).items()}
    files = {name: stem.with_name(f"{stem.name}.{name}.bin") for name in shapes}
    sizes = {name: math.prod(shape) * vars(like)[name].dtype.itemsize for name, shape in shapes.items()}
    stem.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(stem.with_name(f"{stem.name}.lock")):  # two runs may want the same
        if not all(file.is_file() and file.stat().st_size == sizes[name] for name, file in files.items()):
            for left in stem.parent.glob(f"{stem.name}.*.part"):  # by a writer that was killed
                left.unlink()
            _write(files, parts, sum(sizes.values()))
    return Positions(**{name: _mapped(file, vars(like)[name].dtype, shapes[name]) for name, file in files.items()})


def _write(files: dict[str, Path], parts: Iterable[Positions], num_bytes: int) -> None:
    folder = next(iter(files.values())).parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise _full(folder, num_bytes, free)
    unfinished = {name: file.with_suffix(".part") for name, file in files.items()}
    try:
        handles = {name: file.open("wb") for name, file in unfinished.items()}
        try:
            for part in parts:
                for name, handle in handles.items():
                    handle.write(vars(part)[name].cpu().contiguous().view(torch.uint8).numpy().tobytes())
        finally:
            for handle in handles.values():
                handle.close()
        for name, file in unfinished.items():
            os.replace(file, files[name])
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _full(folder, num_bytes, shutil.disk_usage(folder).free) from error
    finally:
        for file in unfinished.values():
            file.unlink(missing_ok=True)


def _mapped(file: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    return torch.from_file(str(file), shared=False, size=math.prod(shape), dtype=dtype).view(shape)


def _full(folder: Path, num_bytes: int, free: int) -> StageError:
    return StageError(
        f"the disk of {folder} has {free / GB:.2g} GB free, the hidden states of this worker need {num_bytes / GB:.2g}; "
        "free some space, or lower train.cache_quota_gb (0 keeps none) to compute them again each epoch"
    )
