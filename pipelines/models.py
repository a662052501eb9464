"""From configuration to loaded models: the words "default" and "none", real threads. Knows medusa; knows no Ray."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.config import BackboneSection, Config
from pipelines.errors import StageError

if TYPE_CHECKING:
    from medusa import Model


def heads_choice(text: str) -> str | None:
    """What `medusa.load(heads=)` wants: "none" is None; names and folders stay."""
    return None if text == "none" else text


def trained_heads(config: Config) -> Path:
    """The working directory's checkpoint. StageError where there is none."""
    folder = config.layout.checkpoint
    if not folder.is_dir():
        raise StageError(f"no checkpoint at {folder}; run `train` first")
    return folder


def load_model(backbone: BackboneSection, heads: str, *, dtype: str | None = None) -> Model:
    """Backbone with heads (the name of shipped ones, a folder, "none"), in the backbone's dtype unless another is asked for."""
    from transformers.utils import logging as transformers_logging

    import medusa

    transformers_logging.disable_progress_bar()  # a stage shows its own
    return medusa.load(backbone.name, heads=heads_choice(heads), dtype=dtype or backbone.dtype, device=backbone.device)


def num_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: by its affinity, and by its container's share of time, begun cores counted whole."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota(cgroup))))


def _quota(cgroup: Path) -> float:
    """Cores whose time a container may take, as cgroup v2 or v1 says it; infinite where it is not limited."""
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # no such file; "max", which is no number
            quota, period = map(int, " ".join((cgroup / name).read_text() for name in names).split())
            return quota / period if quota > 0 else math.inf
    return math.inf


def use_threads(wanted: int | None, *, processes: int) -> None:
    """Compute threads of this process: `wanted`, or the cores that it may use divided among `processes`.

    Ray sets OMP_NUM_THREADS from an actor's logical CPUs, which say little about the cores that it may use.
    """
    import torch

    torch.set_num_threads(wanted or max(1, num_cores() // processes))
