"""What a measurement was made of, as one key: where it has not changed, the measurement is not made again.

Knows files and plain values; knows no stage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from pipelines.errors import StageError
from pipelines.models import num_cores

VERSION = 2  # of how is measured: raised where the same inputs would give other figures than before


def inputs_key(*parts: object) -> str:
    """A key that two measurements of one VERSION share exactly when `parts` (plain values, Pydantic's JSON dumps) are equal."""
    return hashlib.sha256(json.dumps([VERSION, *parts], sort_keys=True).encode()).hexdigest()[:16]


def weights_digest(folder: Path) -> str:
    """Hash of a checkpoint's tensors: what calibration, which writes tree and card anew, leaves as it is."""
    return files_digest(folder, folder.glob("*.safetensors"))


def files_digest(folder: Path, paths: Iterable[Path]) -> str:
    """Hash of the names, below `folder`, and bytes of those of `paths` that are files, in whatever order they come."""
    digest = hashlib.sha256()
    for file in sorted(path for path in paths if path.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as opened:
            hashlib.file_digest(opened, lambda: digest)  # goes on with `digest`
    return digest.hexdigest()


def require_unchanged(folder: Path, digest: Callable[[Path], str], before: str) -> None:
    """StageError unless the `digest` of what was measured, `before`, is still that of what lies in `folder`."""
    try:
        now = digest(folder)
    except OSError as error:  # it is being replaced
        now = type(error).__name__
    if now != before:
        raise StageError(
            f"{folder} changed while it was measured (digest {before[:16]} before, {now[:16]} now): `train` or `calibrate` put "
            "something else there; run this again"
        )


def machine() -> str:
    """What times measured here depend on: the GPU, or else how many cores there are for this process and what they can do."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{num_cores()} cores, {torch.backends.cpu.get_cpu_capability()}"
