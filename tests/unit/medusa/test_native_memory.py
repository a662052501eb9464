"""Memory for weights: copies that lie side by side, and are gone when the last of them is."""

from __future__ import annotations

import gc
import mmap
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from medusa.native import memory
from medusa.native.memory import CHUNK, HUGE, LINE, held


@pytest.fixture(autouse=True)
def _nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    own = memory.Pages()
    monkeypatch.setattr(memory, "pages", lambda: own)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_a_copy_is_contiguous_aligned_and_its_own(dtype: torch.dtype) -> None:
    weights = [torch.randint(-99, 99, (n, 3)).to(dtype).t() for n in (1, 7, 64, 1000)]
    copies = [held(weight) for weight in weights]
    weights_before = [weight.clone() for weight in weights]
    for weight, copy, before in zip(weights, copies, weights_before, strict=True):
        assert copy.is_contiguous() and copy.dtype == dtype
        assert copy.data_ptr() % LINE == 0
        weight.zero_()
        assert torch.equal(copy, before)


def test_small_ones_share_pages_and_a_large_one_has_its_own() -> None:
    first, second = held(torch.ones(1000)), held(torch.ones(1000))
    assert first.data_ptr() % HUGE == 0
    assert second.data_ptr() == first.data_ptr() + 4032  # 4,000 bytes, in whole lines
    large = held(torch.ones(CHUNK))  # four bytes each
    assert large.data_ptr() % HUGE == 0
    assert float(large.sum()) == CHUNK


def test_memory_is_given_back_with_the_last_that_lies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[weakref.ref[mmap.mmap]] = []

    class Watched(mmap.mmap):
        def __init__(self, *args: object, **options: object) -> None:
            chunks.append(weakref.ref(self))

    monkeypatch.setattr(mmap, "mmap", Watched)

    def are_gone() -> list[bool]:
        gc.collect()
        return [chunk() is None for chunk in chunks]

    first, second = held(torch.ones(CHUNK // 4)), held(torch.ones(CHUNK // 4))
    large, other = held(torch.ones(CHUNK // 2)), held(torch.ones(8))
    assert are_gone() == [False] * 4
    del first, large
    assert are_gone() == [True, False, True, False]
    assert float(second.sum()) == CHUNK // 4 and float(other.sum()) == 8


@pytest.mark.parametrize("how", ["refused", "unknown"])
def test_a_system_without_huge_pages_does_without(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(mmap.mmap):
        def madvise(self, *_: object) -> None:
            raise OSError("no such advice") if how == "refused" else AttributeError("MADV_HUGEPAGE")

    monkeypatch.setattr(mmap, "mmap", Plain)
    assert torch.equal(held(torch.arange(9)), torch.arange(9))


class Slow:
    """Places that take a moment to cut, so that threads meet there."""

    def __init__(self, places: range) -> None:
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, part: slice) -> Slow:
        time.sleep(1e-4)
        return Slow(self.places[part])


def test_threads_get_places_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    shared: Any = memory.pages()
    monkeypatch.setattr(shared, "_left", Slow(range(200 * LINE)))
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(shared.take, [LINE] * 100))
    assert sorted(place.places.start for place in taken) == [LINE * i for i in range(100)]
