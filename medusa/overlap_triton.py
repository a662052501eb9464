"""Kernels that start before the one before them has ended. Knows launches; knows no kernel.

From Hopper on, a kernel that is launched so ("programmatic dependent launch") may begin while the one before it runs, and waits
for its results where it says so. Every kernel of such a chain must wait: what lies further back is then certain to have
ended too. Import this where Triton is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FIRST_CAPABILITY = (9, 0)


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Let the next kernel start, then wait until the one before has ended. What stands in front of this reads nothing that a
    kernel writes, and writes nothing."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


def launch_options(overlap: bool) -> dict[str, Any]:
    """What a launch with OVERLAP wants besides."""
    return {"launch_pdl": True} if overlap else {}


@cache
def can_overlap(device: torch.device) -> bool:
    """Has this device such launches?"""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY


@cache
def num_processors(device: torch.device) -> int:
    """A GPU's multiprocessors; 1 elsewhere, where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
