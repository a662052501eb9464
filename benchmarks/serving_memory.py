"""What a server's processes hold: memory and sockets, read from /proc over time. Knows Linux; knows nothing of serving."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A process and all below it at one moment. `rss_mib` counts what processes share once for each; `largest_mib` is that
    of the largest of them, which holds the model."""

    at_s: float
    num_processes: int
    rss_mib: float
    largest_mib: float
    sockets: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """`growth_mib`: the last quarter's median less the second quarter's, the first being left out as warm-up; and that of
    the largest process alone."""

    before_mib: float
    peak_mib: float
    after_mib: float
    growth_mib: float
    largest_growth_mib: float
    sockets_before: int
    sockets_after: int

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Memory:
        quarter = max(1, len(samples) // 4)
        second, last = samples[quarter : 2 * quarter] or samples, samples[-quarter:]
        return cls(
            before_mib=samples[0].rss_mib,
            peak_mib=max(sample.rss_mib for sample in samples),
            after_mib=samples[-1].rss_mib,
            growth_mib=median(s.rss_mib for s in last) - median(s.rss_mib for s in second),
            largest_growth_mib=median(s.largest_mib for s in last) - median(s.largest_mib for s in second),
            sockets_before=samples[0].sockets,
            sockets_after=samples[-1].sockets,
        )


def family(pid: int) -> list[int]:
    """`pid` and the processes below it."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += [int(child) for child in (task / "children").read_text().split()]
    return [pid, *(below for child in children for below in family(child))]


def command_line(pid: int) -> str:
    """Empty for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def sample(pid: int) -> Sample:
    pids = family(pid)
    sizes = list(map(_rss_mib, pids))
    return Sample(
        at_s=time.perf_counter(),
        num_processes=len(pids),
        rss_mib=sum(sizes),
        largest_mib=max(sizes),
        sockets=sum(map(_num_sockets, pids)),
    )


@contextlib.asynccontextmanager
async def watched(pid: int | None, *, every_s: float = 1.0) -> AsyncIterator[list[Sample]]:
    """Samples of the time of the block, one at each of its ends at least; none without a process."""
    samples: list[Sample] = []
    if pid is None:
        yield samples
        return

    async def watch() -> None:
        while True:
            samples.append(await asyncio.to_thread(sample, pid))
            await asyncio.sleep(every_s)

    samples.append(sample(pid))
    watcher = asyncio.ensure_future(watch())
    try:
        yield samples
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        samples.append(sample(pid))


def _rss_mib(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_MIB
    except OSError:
        return 0.0


def _num_sockets(pid: int) -> int:
    found = 0
    with contextlib.suppress(OSError):
        for name in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found += str(name.readlink()).startswith("socket:")
    return found
