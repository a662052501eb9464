"""On a GPU a step's end is four Triton kernels, and what PyTorch's operations make of it. Needs CUDA and Triton."""

from __future__ import annotations

import pytest
import torch

from medusa.acceptance import accept
from medusa.config import SamplingParams
from medusa.kv_cache import KVCache
from medusa.sampling import SamplingRows
from medusa.tree import Tree
from medusa.triton_support import has_triton

DEVICE = torch.device("cuda")
TREES = {
    "root": Tree.root_only(),
    "chain": Tree.chain(9),
    "wide": Tree.full([6, 3, 2]),
    "large": Tree.full([8, 5, 3, 1]),
}


@pytest.fixture(autouse=True)
def _needs_triton() -> None:
    if not has_triton():
        pytest.skip("needs Triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("tree", TREES)
def test_walks_are_those_of_the_plain_code(tree: str, limit: int | None, dtype: torch.dtype) -> None:
    """Each node's token is the best or the second best of 50,000, so walks go some way; a NaN is the best there is."""
    trees = TREES[tree].on(DEVICE).rows(3)
    rows = SamplingRows.of([SamplingParams(tree_nodes=limit)] * 3, DEVICE)
    for _ in range(20):
        tokens = torch.randint(2, trees.depths.shape, device=DEVICE) * 49_000
        logits = torch.randn(*tokens.shape, 50_000, device=DEVICE).clamp(max=3.0)
        logits[..., ::49_000] = torch.randint(4, 6, (*tokens.shape, 2), device=DEVICE).float()
        logits[torch.rand(tokens.shape, device=DEVICE) < 0.05, 777] = float("nan")
        verified = trees, tokens, logits.to(dtype), rows, torch.zeros(3, dtype=torch.long, device=DEVICE)
        found, want = (accept(*verified, fused=fused) for fused in (True, False))
        for name in ("node", "num_accepted", "next_root", "path"):
            assert torch.equal(getattr(found, name), getattr(want, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compaction_moves_what_the_plain_one_moves(dtype: torch.dtype) -> None:
    """Sources and targets overlap in most of these paths: whoever writes too early spoils what another has yet to read."""
    ours, plain = (
        KVCache(
            num_layers=32,
            num_slots=3,
            capacity=300,
            num_kv_heads=32,
            head_dim=128,
            dtype=dtype,
            device=DEVICE,
            fused=fused,
        )
        for fused in (True, False)
    )
    ours.store.copy_(torch.randn(ours.store.shape, device=DEVICE))
    plain.store.copy_(ours.store)
    for _ in range(20):
        kept = torch.stack([torch.randperm(14, device=DEVICE)[:9].sort().values for _ in range(2)])
        kept = torch.where(torch.arange(9, device=DEVICE) < torch.randint(1, 10, (2, 1), device=DEVICE), kept, -1)
        offsets = torch.randint(280, (2,), device=DEVICE)
        for cache in (ours, plain):
            cache.compact(first_slot=1, offsets=offsets, kept=kept)
    assert torch.equal(ours.store, plain.store)
