"""Masks by definition, attention by the textbook."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa.attention import step_mask, tree_attention
from medusa.errors import BackboneError
from medusa.tree import Tree
from tests.unit.medusa.tiny import trees

MODULE: Any = SimpleNamespace()


@settings(max_examples=60, deadline=None)
@given(trees(), st.lists(st.integers(0, 9), min_size=1, max_size=3), st.sampled_from([None, 1, 3, 7]))
def test_a_node_sees_prefix_ancestors_and_itself_within_the_window(
    tree: Tree, prefixes: list[int], window: int | None
) -> None:
    length = max(prefixes) + tree.num_nodes + 2
    mask = step_mask(
        offsets=torch.tensor(prefixes), depths=torch.tensor(tree.depths), visible=tree.ancestor_mask,
        length=length, dtype=torch.float32, window=window,
    )  # fmt: skip
    assert mask.shape == (len(prefixes), 1, tree.num_nodes, length)
    for row, prefix in enumerate(prefixes):
        for node, path in enumerate(tree.paths):
            for slot in range(length):
                if slot < prefix:
                    seen, position = True, slot
                elif slot < prefix + tree.num_nodes:
                    other = tree.paths[slot - prefix]
                    seen, position = path[: len(other)] == other, prefix + len(other)
                else:
                    seen, position = False, 0
                if window is not None:
                    seen = seen and prefix + len(path) - position < window
                assert (mask[row, 0, node, slot] == 0) == seen


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("groups", [1, 3])
def test_attention_is_the_textbooks(softcap: float | None, groups: int) -> None:
    batch, kv_heads, new, length, size = 2, 2, 5, 9, 4
    q = torch.randn(batch, kv_heads * groups, new, size, dtype=torch.float64)
    k, v = (torch.randn(batch, kv_heads, length, size, dtype=torch.float64) for _ in range(2))
    allowed = torch.rand(batch, 1, new, length) < 0.5
    allowed[..., 0] = True
    mask = torch.zeros_like(allowed, dtype=torch.float64).masked_fill(~allowed, float("-inf"))
    out, _ = tree_attention(MODULE, q, k, v, mask, scaling=0.3, softcap=softcap)
    scores = torch.einsum("bhne,bhse->bhns", q, k.repeat_interleave(groups, 1)) * 0.3
    scores = torch.tanh(scores / softcap) * softcap if softcap else scores
    want = torch.softmax(scores + mask, -1) @ v.repeat_interleave(groups, 1)
    torch.testing.assert_close(out, want.transpose(1, 2))


def test_long_fully_masked_stretches_give_no_nan() -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 2048, 8)
    mask = torch.full((1, 1, 3, 2048), float("-inf"))
    mask[..., -1] = 0
    out, _ = tree_attention(MODULE, q, k, k, mask, scaling=1.0)
    torch.testing.assert_close(out, k[:, :, -1:].transpose(1, 2).expand(1, 3, 2, 8))


def test_what_attention_cannot_honour_is_refused() -> None:
    q = torch.randn(1, 1, 1, 4)
    with pytest.raises(BackboneError, match="sinks"):
        tree_attention(MODULE, q, q, q, torch.zeros(1, 1, 1, 1), scaling=1.0, s_aux=torch.zeros(1))
    with pytest.raises(BackboneError, match="no mask"):
        tree_attention(MODULE, q, q, q, None, scaling=1.0)
