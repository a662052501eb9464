"""How many threads a process takes, and what its times are said to depend on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from pipelines.inputs import machine
from pipelines.models import use_threads

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="no two cores to choose between"
)


@pytest.fixture
def cores() -> Iterator[list[int]]:
    """The cores of this process, which gets them and its threads back."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    yield sorted(cores)
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


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
