"""The prefix cache against the list of all that was ever kept in it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa.prefix_cache import BLOCK, PrefixCache, shared_tokens

# Sequences of whole blocks out of two kinds, and a rest: so that they share beginnings of every length.
sequences = st.builds(
    lambda kinds, rest: [token for kind in kinds for token in [kind] * BLOCK] + [9] * rest,
    st.lists(st.integers(0, 1), max_size=5),
    st.integers(0, BLOCK - 1),
)


def reader(tokens: Sequence[int]) -> Callable[[int, int], torch.Tensor]:
    """Keys and values that tell at which position and behind which tokens they were made."""

    def read(start: int, stop: int) -> torch.Tensor:
        return torch.tensor([hash(tuple(tokens[: p + 1])) % 2**52 for p in range(start, stop)]).view(1, 1, -1, 1)

    return read


def common(one: Sequence[int], other: Sequence[int]) -> int:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in same) // BLOCK * BLOCK


def taken(cache: PrefixCache, tokens: Sequence[int]) -> list[int]:
    return [value for piece in cache.take(tokens, 0) for value in piece.flatten().tolist()]


@settings(max_examples=200, deadline=None)
@given(kept=st.lists(sequences, max_size=8), asked=sequences)
def test_with_room_for_all_the_longest_common_beginning_is_found(kept: list[list[int]], asked: list[int]) -> None:
    cache = PrefixCache(10_000)
    for tokens in kept:
        cache.keep(tokens, reader(tokens), 0)
    want = max((common(asked, tokens) for tokens in kept), default=0)
    assert cache.known(asked, 0) == want == max((shared_tokens(asked, tokens) for tokens in kept), default=0)
    assert taken(cache, asked) == reader(asked)(0, want).flatten().tolist()
    distinct = {tuple(t[: stop + BLOCK]) for t in kept for stop in range(0, len(t) - BLOCK + 1, BLOCK)}
    assert cache.num_tokens == BLOCK * len(distinct), "what is shared is held once"


@settings(max_examples=200, deadline=None)
@given(jobs=st.lists(st.tuples(sequences, st.booleans(), st.integers(0, 1)), max_size=14), blocks=st.integers(1, 4))
def test_however_small_it_is_right_and_within_its_bound(jobs: list[tuple[list[int], bool, int]], blocks: int) -> None:
    cache = PrefixCache(blocks * BLOCK + 3)
    kept: list[tuple[int, list[int]]] = []
    for tokens, keeps, version in jobs:
        if keeps:
            cache.keep(tokens, reader(tokens), version)
            kept.append((version, tokens))
            assert cache.known(tokens, version) == min(len(tokens) // BLOCK, blocks) * BLOCK, "the newest is held"
        else:
            found = cache.known(tokens, version)
            assert found <= max((common(tokens, other) for v, other in kept if v == version), default=0)
            pieces = cache.take(tokens, version)
            values = [value for piece in pieces for value in piece.flatten().tolist()]
            assert values == reader(tokens)(0, found).flatten().tolist()
        assert cache.num_tokens <= blocks * BLOCK


def test_what_was_used_last_stays() -> None:
    first, second, third = ([kind] * BLOCK for kind in (1, 2, 3))
    cache = PrefixCache(2 * BLOCK)
    cache.keep(first, reader(first), 0)
    cache.keep(second, reader(second), 0)
    assert taken(cache, first)
    cache.keep(third, reader(third), 0)
    assert [cache.known(tokens, 0) for tokens in (first, second, third)] == [BLOCK, 0, BLOCK]


def test_another_version_of_the_weights_finds_nothing_and_empties_it() -> None:
    tokens = [1] * (2 * BLOCK)
    cache = PrefixCache(100)
    cache.keep(tokens, reader(tokens), "old")
    assert cache.known(tokens, "old") == 2 * BLOCK
    assert cache.known(tokens, "new") == 0 and cache.num_tokens == 0
    assert cache.take(tokens, "old") == []


def test_a_cache_smaller_than_a_block_is_off() -> None:
    assert not PrefixCache(0).enabled and not PrefixCache(BLOCK - 1).enabled and PrefixCache(BLOCK).enabled
    with pytest.raises(ValueError, match="got -1"):
        PrefixCache(-1)
