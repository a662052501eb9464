"""Which path is accepted and what is drawn, by the CPU kernels: as by PyTorch, token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medusa import acceptance
from medusa.acceptance import Acceptance
from medusa.config import SamplingParams
from medusa.native.build import library
from medusa.sampling import SamplingRows
from medusa.tree import Tree
from tests.unit.medusa.tiny import trees

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler here")
SCHEMES: list[dict[str, Any]] = [
    {},
    dict(temperature=0.8, acceptance="rejection"),
    dict(temperature=1.3, acceptance="rejection", top_p=0.9),
    dict(temperature=1.3, acceptance="rejection", top_k=6),
    dict(temperature=1.3, acceptance="rejection", top_k=12, top_p=0.8),
    dict(temperature=0.8),
    dict(temperature=0.8, root="greedy"),
    dict(temperature=1.3, epsilon=0.02, delta=0.1, top_p=0.7),
    dict(temperature=1.3, epsilon=0.02, delta=0.1, top_k=3),
    dict(temperature=1.3, epsilon=0.02, delta=0.1, top_k=20, top_p=0.6),
]


@settings(max_examples=60, deadline=None)
@given(
    tree=trees(),
    schemes=st.lists(st.sampled_from(SCHEMES), min_size=1, max_size=3),
    vocab_size=st.sampled_from([70, 777]),
    limited=st.booleans(),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_paths_are_accepted_as_pytorch_accepts_them(
    tree: Tree,
    schemes: list[dict[str, Any]],
    vocab_size: int,
    limited: bool,
    masked: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Few likely tokens, so that walks go far, siblings' different ones, with ties among them; each row's own limit; and
    tokens that a grammar rules out."""
    generator = torch.Generator().manual_seed(seed)
    batch, ranks = len(schemes), torch.tensor([path[-1] if path else 0 for path in tree.paths])
    tokens = torch.stack([torch.randperm(tree.width + 1, generator=generator)[ranks] for _ in range(batch)])
    logits = torch.randn(batch, tree.num_nodes, vocab_size, generator=generator)
    logits[..., : tree.width + 1] += 4
    logits[..., 20:50] = logits[..., 20:50].round()
    if masked:
        logits[..., torch.randperm(vocab_size, generator=generator)[: vocab_size // 3]] = -torch.inf
    params = [
        SamplingParams(tree_nodes=2 + row if limited else None, seed=seed, choice=row, **scheme)
        for row, scheme in enumerate(schemes)
    ]
    ours, want = accepted_both_ways(tree, tokens, logits.to(dtype), params)
    for name in ("node", "num_accepted", "next_root"):
        assert torch.equal(getattr(ours, name), getattr(want, name)), name


def accepted_both_ways(
    tree: Tree, tokens: Tensor, logits: Tensor, params: list[SamplingParams]
) -> tuple[Acceptance, Acceptance]:
    """By the kernels and by PyTorch."""
    rows, position = SamplingRows.of(params, CPU), torch.full((len(params),), 7)
    verified = tree.on(CPU).rows(len(params)), tokens, logits, rows, position
    ours = acceptance.accept(*verified, early_exit=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acceptance, "can_walk", lambda _: False)
        return ours, acceptance.accept(*verified, early_exit=True)


def test_a_greedy_row_with_nan_is_walked_as_pytorch_walks_it() -> None:
    logits = torch.zeros(2, 2, 70)
    logits[0, 0, 1:3] = torch.nan
    tree, tokens = Tree.from_paths([(0,)]), torch.tensor([[0, 1], [0, 1]])
    ours, want = accepted_both_ways(tree, tokens, logits, [SamplingParams()] * 2)
    assert ours.node.tolist() == want.node.tolist() == [1, 0]
    assert ours.next_root.tolist() == want.next_root.tolist()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 5, 64, 301, 49152])
def test_the_likeliest_token_is_where_pytorch_finds_it(
    size: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal ones the first, of a row without numbers likewise, and a NaN before all."""
    x = torch.randint(-9, 9, (9, size)).float()
    x[1] = -torch.inf
    x[2, size // 2], x[2, -1] = torch.nan, torch.nan
    x[3, size // 3] = torch.inf
    x[4] = torch.randn(size)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    ours, want = accepted_both_ways(
        Tree.root_only(), torch.zeros(9, 1, dtype=torch.long), x[:, None], [SamplingParams()] * 9
    )
    assert ours.next_root.tolist() == want.next_root.tolist() == x.argmax(dim=-1).tolist()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_without_numbers_ends_and_no_row_beside_it_notices(scheme: dict[str, Any]) -> None:
    tree = Tree.full([3, 2])
    tokens = torch.arange(tree.num_nodes).repeat(3, 1)
    logits = torch.randn(3, tree.num_nodes, 70)
    logits[0], logits[2] = torch.nan, -torch.inf
    params = [SamplingParams(**scheme)] * 3
    together, _ = accepted_both_ways(tree, tokens, logits, params)
    alone, _ = accepted_both_ways(tree, tokens[1:2], logits[1:2], params[1:2])
    assert all(0 <= token < 70 for token in together.next_root.tolist())
    assert (together.node[1], together.next_root[1]) == (alone.node[0], alone.next_root[0])


@pytest.mark.parametrize("top", [{}, {"top_p": 0.9}, {"top_k": 300}, {"top_k": 40, "top_p": 0.9}])
def test_draws_of_a_whole_vocabulary_are_those_of_pytorch(top: dict[str, Any]) -> None:
    """As wide and as peaked as a language model's; 200 positions. Noise is the same function to the last bits."""
    logits = torch.randn(200, 1, 49152) * 3
    params = [SamplingParams(temperature=1.1, acceptance="rejection", seed=n, **top) for n in range(200)]
    tokens = torch.zeros(200, 1, dtype=torch.long)
    ours, want = accepted_both_ways(Tree.root_only(), tokens, logits, params)
    assert torch.equal(ours.next_root, want.next_root)
    assert len(set(ours.next_root.tolist())) > 100


@pytest.mark.parametrize("top_p", [1.0, 0.85])
def test_draws_follow_the_distribution_by_a_chi_square_test(top_p: float) -> None:
    """As `test_sampling` does of PyTorch's: 9 degrees of freedom at most, 20,000 draws, p = 1e-4, fixed keys. With top-p 0.85 the
    first six tokens are left."""
    probs, count = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.08, 0.07, 0.05, 0.03, 0.015, 0.005]), 20_000
    kept = probs.double() * (torch.arange(10) < (10 if top_p == 1 else 6))
    expected = count * kept / kept.sum()
    tree, logits = Tree.root_only().on(CPU).rows(count), probs.log().expand(count, 1, -1).contiguous()
    for seed in range(5):
        params = SamplingParams(temperature=1.0, acceptance="rejection", seed=seed, choice=seed, top_p=top_p)
        rows, nowhere = SamplingRows.of([params] * count, CPU), torch.zeros(count, 1, dtype=torch.long)
        drawn = acceptance.accept(tree, nowhere, logits, rows, torch.arange(count), early_exit=True).next_root
        counts = torch.bincount(drawn, minlength=10)
        assert (counts[expected == 0] == 0).all()
        assert ((counts - expected) ** 2 / expected)[expected > 0].sum() < 33.7
