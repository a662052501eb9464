"""Ranks to tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa.candidates import ranked_tokens, static_candidates
from medusa.tree import Tree
from tests.unit.medusa.tiny import trees

CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-2.5, -1.0, -0.0, 0.0, 1.0, 7.5, 1e30, -1e30]), min_size=3, max_size=20))
def test_of_equal_logits_the_lowest_id_comes_first(values: list[float]) -> None:
    want = sorted(range(len(values)), key=lambda i: (-values[i], i))
    for dtype in (torch.bfloat16, torch.float32):
        rounded = torch.tensor(values, dtype=dtype)
        assert ranked_tokens(rounded, len(values)).tolist() == want


def test_random_logits_rank_as_topk_ranks_them() -> None:
    logits = torch.randn(3, 4, 5000)
    assert torch.equal(ranked_tokens(logits, 10), torch.topk(logits, 10).indices)


def test_infinities_have_their_place() -> None:
    logits = torch.tensor([0.0, float("-inf"), float("inf")])
    assert ranked_tokens(logits, 3).tolist() == [2, 0, 1]


@given(trees())
def test_each_node_carries_the_ranked_token_of_its_own_head(tree: Tree) -> None:
    logits = torch.randn(2, 3, 12)
    tokens = static_candidates(tree.on(CPU), torch.tensor([4, 9]), ranked_tokens(logits, 12))
    order = logits.argsort(dim=-1, descending=True)
    for row in range(2):
        assert tokens[row, 0] == [4, 9][row]
        for node, path in enumerate(tree.paths[1:], start=1):
            assert tokens[row, node] == order[row, len(path) - 1, path[-1]]


def test_guesses_among_some_tokens_are_named_by_their_own_ids() -> None:
    logits = torch.randn(4, 20)
    some = torch.tensor([2, 3, 7, 11, 19])
    want = [[i for i in row if i in some.tolist()] for row in logits.argsort(descending=True).tolist()]
    assert ranked_tokens(logits[:, some], 5, some).tolist() == want


@pytest.mark.parametrize("best", [None, torch.zeros(1, 3, 2).long()])
def test_the_root_alone_needs_no_heads(best: torch.Tensor | None) -> None:
    assert static_candidates(Tree.root_only().on(CPU), torch.tensor([7]), best).tolist() == [[7]]
