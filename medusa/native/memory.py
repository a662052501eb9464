"""Memory for what every step reads whole: in huge pages, where the system has them. Knows tensors; knows no weights.

A step reads each weight once and in order, so every small page costs it a walk through the page tables, a long one in a virtual
machine.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from functools import cache

import torch
from torch import Tensor

HUGE = 2 * 2**20  # bytes of a huge page on x86-64, and of most elsewhere
CHUNK = 16 * HUGE  # asked of the system at once: many a weight is smaller than a page
LINE = 64


class Pages:
    """Places in memory asked of the system in chunks, for a process's weights. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """So many bytes from a cache line's begin on; what is large has a chunk of its own, given back with it. A shared chunk
        is given back when all that was taken of it is gone, and the next was begun."""
        if size > CHUNK:
            return _chunk(size)[:size]
        with self._lock:
            if size > len(self._left):
                self._left = _chunk(CHUNK)
            place, self._left = self._left[:size], self._left[-(-size // LINE) * LINE :]
        return place


@cache
def pages() -> Pages:
    """This process's."""
    return Pages()


def held(tensor: Tensor) -> Tensor:
    """A contiguous copy of a CPU tensor, beside others of its kind."""
    place = pages().take(tensor.numel() * tensor.element_size())
    return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _chunk(size: int) -> Tensor:
    """At least so many bytes, from a huge page's begin on."""
    memory = mmap.mmap(-1, -(-size // HUGE) * HUGE + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # a system, or a kernel, without
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % HUGE :][: len(whole) - HUGE]
