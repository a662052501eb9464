"""Replaying an answer takes the steps that decoding it took."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa.config import SamplingParams
from medusa.engine import Engine, Request
from medusa.losses import IGNORE
from medusa.replay import MISSED, grow_from_ranks, guessed_ranks, num_steps, ranks_of
from medusa.tree import Tree
from medusa.tree_search import count_hits, expected_tokens, grow_paths, measure_hits
from tests.unit.medusa.tiny import NUM_HEADS, VOCAB, random_heads, tiny_backbone, trees

BACKBONE = tiny_backbone()
HEADS = random_heads(BACKBONE)
PROMPTS = ([3, 4, 5], [7], [6, 6, 2, 8, 9])


@settings(max_examples=25, deadline=None)
@given(tree=trees(), max_tokens=st.integers(1, 24), ignore_eos=st.booleans())
def test_replayed_steps_are_those_of_the_engine(tree: Tree, max_tokens: int, ignore_eos: bool) -> None:
    engine = Engine(BACKBONE, HEADS, tree=tree, max_batch_size=2, context_length=64)
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
    done = list(engine.run([Request(prompt_ids=p, params=params, request_id=str(i)) for i, p in enumerate(PROMPTS)]))
    answers = {int(one.request_id): one for one in done}
    pairs = [(prompt, answers[i].token_ids) for i, prompt in enumerate(PROMPTS)]
    for i, ranks in enumerate(guessed_ranks(BACKBONE, HEADS, pairs, num_ranks=VOCAB, rows=5)):
        assert ranks.shape == (answers[i].stats.num_tokens - 1, NUM_HEADS)
        assert num_steps(ranks, tree) == answers[i].stats.num_steps


def test_ranks_are_counted_as_hits_are() -> None:
    """Against the count that calibration makes of the same answers."""
    pairs = [([3, 4, 5], [6, 7, 8, 9, 10, 3]), ([7], [5, 4])]
    ranks = torch.cat(list(guessed_ranks(BACKBONE, HEADS, pairs, num_ranks=4)))
    hits = torch.stack([(ranks == rank).sum(dim=0) for rank in range(4)], dim=1)
    assert hits.tolist() == measure_hits(BACKBONE, HEADS, pairs, num_ranks=4).hits.tolist()


def test_the_rank_of_a_target_is_its_place_among_the_guesses() -> None:
    guesses = torch.tensor([[[1, 2], [0, 1]], [[0, 1], [2, 0]]])
    targets = torch.tensor([[2, 3], [0, IGNORE]])
    assert ranks_of(guesses, targets).tolist() == [[1, MISSED], [0, MISSED]]
    assert count_hits(guesses, targets).hits.sum() == 2


@pytest.mark.parametrize(
    ("paths", "steps"),
    [([], 5), ([(0,)], 4), ([(0,), (0, 1)], 3), ([(0,), (0, 1), (0, 1, 0)], 2), ([(1,), (1, 1)], 5)],
)
def test_a_step_emits_the_path_it_accepts_and_the_next_root(paths: list[tuple[int, ...]], steps: int) -> None:
    """Six tokens, five after the first: the first position's heads guess the next three at ranks 0, 1, 0."""
    ranks = torch.tensor([[0, 1, 0], [MISSED] * 3, [2, MISSED, MISSED], [MISSED] * 3, [MISSED] * 3])
    assert num_steps(ranks, Tree.from_paths(paths)) == steps


def random_ranks(seed: int, positions: int = 60, heads: int = 2, ranks: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(MISSED, ranks, (positions, heads), generator=generator)


def accepted(ranks: torch.Tensor, paths: Iterable[tuple[int, ...]]) -> int:
    """Nodes of a tree that are right, over all positions."""
    return sum(all(row[d] == rank for d, rank in enumerate(path)) for row in ranks.tolist() for path in paths)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_without_a_prior_the_tree_is_the_best_for_the_positions_themselves(seed: int, num_nodes: int) -> None:
    """Against brute force over every prefix-closed tree of that size."""
    ranks = random_ranks(seed)
    nodes = [path for depth in (1, 2) for path in product(range(2), repeat=depth)]
    best = max(
        accepted(ranks, paths)
        for paths in combinations(nodes, min(num_nodes, len(nodes)) - 1)
        if all(path[:-1] in paths or len(path) == 1 for path in paths)
    )
    assert accepted(ranks, grow_from_ranks(ranks, num_nodes, num_ranks=2, prior=0.0)) == best


@given(st.integers(0, 10**6))
def test_grown_trees_are_nested_and_prefix_closed(seed: int) -> None:
    ranks = random_ranks(seed, heads=3, ranks=4)
    grown = grow_from_ranks(ranks, 30, num_ranks=4)
    for size in range(len(grown) + 1):
        assert Tree.from_paths(grown[:size]).num_nodes == size + 1
        assert grow_from_ranks(ranks, size + 1, num_ranks=4) == grown[:size]


def test_a_strong_prior_is_the_tree_of_independent_heads() -> None:
    ranks = random_ranks(3, positions=400, heads=3, ranks=3)
    accuracy = torch.stack([(ranks == rank).double().mean(dim=0) for rank in range(3)], dim=1)
    ours, theirs = grow_from_ranks(ranks, 12, num_ranks=3, prior=1e12), grow_paths(accuracy, 12)
    assert expected_tokens(accuracy, ours) == pytest.approx(expected_tokens(accuracy, theirs))


def test_heads_that_are_right_together_grow_a_deep_tree() -> None:
    """Half of the positions are right all the way, the others not at all: depth pays, width does not."""
    ranks = torch.tensor([[0, 0, 0]] * 200 + [[1, MISSED, MISSED]] * 80 + [[MISSED] * 3] * 120)
    assert grow_from_ranks(ranks, 4) == [(0,), (0, 0), (0, 0, 0)]
    accuracy = torch.stack([(ranks == rank).double().mean(dim=0) for rank in range(2)], dim=1)
    assert grow_paths(accuracy, 4) != grow_from_ranks(ranks, 4)
