"""Replaying an answer takes the steps that decoding it took."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa.config import SamplingParams
from medusa.dynamic_tree import DynamicTree
from medusa.engine import Engine, Request
from medusa.losses import IGNORE
from medusa.replay import MISSED, accepted_lengths, guessed_ranks, num_steps, ranks_of, steps_through
from medusa.tree import Tree
from medusa.tree_search import count_hits, measure_hits
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


@settings(max_examples=25, deadline=None)
@given(
    superset=trees(), kind=st.sampled_from(["medusa", "hydra"]), keep=st.sampled_from([1, 2, 3]),
    max_tokens=st.integers(1, 24), ignore_eos=st.booleans(),
)  # fmt: skip
def test_replayed_steps_of_trees_of_any_kind_are_those_of_the_engine(
    superset: Tree, kind: str, keep: int, max_tokens: int, ignore_eos: bool
) -> None:
    heads = random_heads(BACKBONE, kind=kind)
    some = -(-superset.num_nodes // keep)
    shapes = [superset, DynamicTree(superset=superset, num_nodes=some, temperatures=(0.5, 1.0, 2.0))]
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
    requests = [Request(prompt_ids=p, params=params, request_id=str(i)) for i, p in enumerate(PROMPTS)]
    decoded = []
    for tree in shapes:
        engine = Engine(BACKBONE, heads, tree=tree, max_batch_size=2, context_length=64)
        decoded.append({int(one.request_id): one for one in engine.run(requests)})
    pairs = [(prompt, decoded[0][i].token_ids) for i, prompt in enumerate(PROMPTS)]
    for i, accepted in enumerate(accepted_lengths(BACKBONE, heads, shapes, pairs, rows=5)):
        for lengths, done in zip(accepted, decoded, strict=True):
            assert len(lengths) == done[i].stats.num_tokens - 1
            assert steps_through(lengths) == done[i].stats.num_steps


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
