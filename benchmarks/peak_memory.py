"""The most memory that this process ever held, on its device. Reads /proc (Linux) or CUDA's counters; knows no model."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

MIB = 2**20
_PROCESS = Path("/proc/self")


def peak_bytes(device: torch.device) -> int:
    """The peak since the process began, or since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage, whose maximum a new process inherits from the one that started it.
    status = (_PROCESS / "status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def reset_peak(device: torch.device) -> int:
    """Let the peak begin at what is held now, which is returned: loading may have held more for a moment."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept for later is held by nobody
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")
    return peak_bytes(device)
