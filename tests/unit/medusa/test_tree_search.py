"""From accuracies to the best tree."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa.losses import IGNORE
from medusa.tree import Tree
from medusa.tree_search import HitTable, best_size, count_hits, expected_tokens, grow_paths, measure_hits
from tests.unit.medusa.tiny import random_heads, tiny_backbone


def table(seed: int, heads: int = 2, ranks: int = 2) -> torch.Tensor:
    return torch.rand(heads, ranks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / ranks


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_greedy_growth_is_optimal(seed: int, num_nodes: int) -> None:
    """Against brute force over every prefix-closed tree of that size."""
    accuracy = table(seed)
    nodes = [p for depth in (1, 2) for p in product(range(2), repeat=depth)]
    best = 0.0
    for chosen in product([False, True], repeat=len(nodes)):
        paths = {p for p, taken in zip(nodes, chosen, strict=True) if taken}
        if len(paths) == num_nodes - 1 and all(p[:-1] in paths or len(p) == 1 for p in paths):
            best = max(best, expected_tokens(accuracy, paths))
    assert expected_tokens(accuracy, grow_paths(accuracy, num_nodes)) == pytest.approx(best)


@given(st.integers(0, 10**6))
def test_trees_are_nested_prefix_closed_and_never_worse_when_larger(seed: int) -> None:
    accuracy = table(seed, heads=3, ranks=5)
    grown = grow_paths(accuracy, 40)
    worth = [expected_tokens(accuracy, grown[:n]) for n in range(len(grown) + 1)]
    assert worth == sorted(worth)
    for n in range(len(grown) + 1):
        assert Tree.from_paths(grown[:n]).num_nodes == n + 1
        assert grow_paths(accuracy, n + 1) == grown[:n]


def test_a_small_vocabulary_gives_every_path_there_is_and_no_more() -> None:
    assert len(grow_paths(table(0), 64)) == 2 + 4


def test_each_head_is_divided_by_its_own_count() -> None:
    hits = HitTable(hits=torch.tensor([[8, 1], [3, 0]]), counts=torch.tensor([10, 5]))
    assert hits.accuracy.tolist() == [[0.8, 0.1], [0.6, 0.0]]


def test_hits_are_counted_by_rank_and_only_where_there_is_a_target() -> None:
    guesses = torch.tensor([[[1, 2], [0, 1]], [[0, 1], [2, 0]]])
    found = count_hits(guesses, torch.tensor([[2, 0], [0, IGNORE]]))
    assert found.hits.tolist() == [[1, 1], [1, 0]] and found.counts.tolist() == [2, 1]


def test_measured_hits_equal_a_count_by_hand() -> None:
    backbone = tiny_backbone()
    heads = random_heads(backbone)
    prompt, answer = [3, 4, 5], [6, 7, 8, 9, 10, 3]
    found = measure_hits(backbone, heads, [(prompt, answer)], num_ranks=12, rows=2)
    ids = prompt + answer
    hidden = backbone.hidden_states(torch.tensor([ids]))[0]
    want = torch.zeros(3, 12, dtype=torch.long)
    for t in range(len(prompt) - 1, len(ids)):
        for k in range(1, 4):
            if t + k + 1 < len(ids):
                order = heads.logits(hidden[t], backbone)[k - 1].argsort(descending=True).tolist()
                want[k - 1, order.index(ids[t + k + 1])] += 1
    assert found.hits.tolist() == want.tolist()
    assert found.counts.tolist() == [5, 4, 3], "later heads have fewer targets"


def test_the_best_size_weighs_tokens_against_step_time() -> None:
    expected = {1: 1.0, 16: 2.0, 64: 2.2}
    assert best_size(expected, {1: 1.0, 16: 1.3, 64: 2.0}) == 16
    assert best_size(expected, {1: 1.0, 16: 2.5, 64: 9.0}) == 1
    assert best_size({1: 1.0, 2: 1.0}, {1: 1.0, 2: 1.0}) == 1
