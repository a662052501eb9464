"""How many threads a process takes, and what its times are said to depend on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipelines.inputs import machine
from pipelines.models import num_cores, use_threads

two_cores = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="no two cores to choose between"
)


@pytest.fixture
def cores() -> Iterator[list[int]]:
    """The cores of this process, which gets them and its threads back."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    yield sorted(cores)
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


@two_cores
def test_only_the_cores_that_a_process_may_use_count(cores: list[int]) -> None:
    use_threads(None, processes=1)
    assert torch.get_num_threads() == len(cores)
    all_of_them = machine()
    os.sched_setaffinity(0, cores[:1])
    use_threads(None, processes=1)
    assert torch.get_num_threads() == 1
    assert machine() != all_of_them or torch.cuda.is_available()
    use_threads(None, processes=3)
    assert torch.get_num_threads() == 1
    use_threads(2, processes=3)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "400000 100000"}, 4),
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 64),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ({}, 64),
    ],
)
def test_a_containers_share_of_time_counts_too(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert num_cores(tmp_path) == cores
