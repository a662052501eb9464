"""The Triton kernels end a step as PyTorch's operations do, bit for bit: on a GPU, or through Triton's interpreter."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton (it comes with CUDA builds of torch)")
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa import acceptance, step_triton
from medusa.acceptance import Acceptance
from medusa.backbone import Backbone
from medusa.config import SamplingParams
from medusa.decoder import Decoder
from medusa.dynamic_tree import DynamicTree
from medusa.kv_cache import KVCache
from medusa.sampling import SamplingRows
from medusa.tree import RowTrees, Tree
from tests.unit.medusa.tiny import random_heads, tiny_backbone, trees

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INFINITY, NAN = float("inf"), float("nan")
STATIC = Tree.full([4, 2, 2])


def drawn_trees(batch: int, nodes: int, depth: int) -> RowTrees:
    """A random tree of its own for each row, parents before children."""
    parents, depths = torch.full((batch, nodes), -1), torch.zeros(batch, nodes, dtype=torch.long)
    for row in range(batch):
        for node in range(1, nodes):
            above = [parent for parent in range(node) if depths[row, parent] < depth]
            parents[row, node] = parent = above[-1 - int(torch.randint(min(4, len(above)), ()))]
            depths[row, node] = depths[row, parent] + 1
    return RowTrees.linked(depths=depths.to(DEVICE), parents=parents.to(DEVICE), depth=depth)


def limited(*max_nodes: int | None) -> SamplingRows:
    return SamplingRows.of([SamplingParams(tree_nodes=n) for n in max_nodes], DEVICE)


def assert_walks_alike(tree: RowTrees, *, vocab: int, limits: tuple[int | None, ...], apart: int = 1) -> Acceptance:
    """With few tokens to choose from, walks go far, and siblings may carry the same one. Those few are multiples of `apart`."""
    rows = limited(*limits)
    tokens = torch.randint(vocab, tree.depths.shape, device=DEVICE) * apart
    logits = torch.full((*tokens.shape, (vocab - 1) * apart + 1), -9.0, device=DEVICE)
    logits[..., ::apart] = torch.randint(-3, 4, (*tokens.shape, vocab), device=DEVICE).float()
    want = acceptance._walk_at_once(tree, tokens, logits, rows)
    found = step_triton.walk(tree, tokens, logits, rows.max_nodes if rows.any_limit else None)
    for name in ("node", "num_accepted", "next_root", "path"):
        assert torch.equal(getattr(found, name), getattr(want, name)), name
        assert getattr(found, name).dtype == torch.long
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("nodes", "depth"), [(1, 0), (1, 3), (2, 1), (5, 4), (17, 3), (64, 6), (256, 9)])
def test_rows_walk_trees_of_their_own(nodes: int, depth: int, seed: int) -> None:
    torch.manual_seed(seed)
    batch = 1 + seed % 3
    limits = [int(n) if seed % 2 else None for n in torch.randint(1, nodes + 2, (batch,))]
    assert_walks_alike(drawn_trees(batch, nodes, depth), vocab=2 + seed % 2, limits=(*limits,))


@settings(max_examples=30, deadline=None)
@given(trees(), st.integers(0, 10**6), st.lists(st.sampled_from([None, 1, 2, 7]), min_size=1, max_size=3))
def test_rows_walk_one_tree_that_all_share(tree: Tree, seed: int, limits: list[int | None]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        assert_walks_alike(tree.on(DEVICE).rows(len(limits)), vocab=2, limits=(*limits,))


@pytest.mark.parametrize("apart", [2047, 2048, 40_000])
def test_what_is_chosen_may_stand_in_any_chunk(apart: int) -> None:
    for _ in range(2):
        assert_walks_alike(drawn_trees(2, 7, 4), vocab=3, limits=(None, None), apart=apart)


def test_a_walk_may_reach_the_last_node_and_a_limit_may_stop_it() -> None:
    chain = Tree.chain(7).on(DEVICE).rows(3)
    tokens = torch.arange(8, device=DEVICE).expand(3, -1)  # rows that share their memory
    logits = torch.nn.functional.one_hot(tokens + 1).float()
    found = step_triton.walk(chain, tokens, logits, limited(None, 4, 1).max_nodes)
    assert found.node.tolist() == found.num_accepted.tolist() == [7, 3, 0]
    assert found.next_root.tolist() == [8, 4, 1]
    assert found.path.tolist()[1:] == [[0, 1, 2, 3, -1, -1, -1, -1], [0] + [-1] * 7]


@pytest.mark.parametrize(
    ("size", "dtype"), [*itertools.product([1, 2, 300, 4096, 4097], DTYPES), (70_000, torch.bfloat16)]
)
def test_the_best_token_is_the_argmax_whatever_ties_and_nans_there_are(size: int, dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, INFINITY, -INFINITY, NAN, -NAN, 6e-8, -6e-8, 65504.0], dtype=dtype)
    drawn = torch.randn(2, 3, size).to(dtype), torch.randint(-2, 3, (2, 3, size)).to(dtype)
    few = special[torch.randint(2, (2, 3, size))], special[torch.randint(4, (2, 3, size))]
    rare = torch.where(torch.rand(2, 3, size) < 2 / size, special[torch.randint(len(special), (2, 3, size))], drawn[0])
    last = torch.zeros(2, 3, size, dtype=dtype)
    last[..., -1] = 1
    for logits in (*drawn, *few, last, rare, special[torch.randint(len(special), (2, 3, size))]):
        logits = logits.to(DEVICE)
        found = -step_triton.best_keys(logits).amax(dim=-1) & 0x7FFFFFFF
        assert torch.equal(found, logits.argmax(dim=-1))
    for value in special:
        found = -step_triton.best_keys(value.expand(1, 1, size).to(DEVICE)).amax(dim=-1) & 0x7FFFFFFF
        assert found.item() == 0, "of equals the first"


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_the_best_of_any_pattern_of_bits(dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    bits = torch.randint(limits.min, limits.max, (50, 2, 40)).to(dtype)
    logits = bits.view(torch.bfloat16 if dtype == torch.int16 else torch.float32).to(DEVICE)
    assert torch.equal(-step_triton.best_keys(logits).amax(dim=-1) & 0x7FFFFFFF, logits.argmax(dim=-1))


def new_cache(*, slots: int, heads: int, size: int, dtype: torch.dtype) -> KVCache:
    cache = KVCache(
        num_layers=2, num_slots=slots, capacity=90, num_kv_heads=heads, head_dim=size, dtype=dtype, device=DEVICE
    )
    cache.store.copy_(torch.randn(cache.store.shape))
    return cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "first_slot", "heads", "size", "slots"),
    [(1, 0, 1, 8, 2), (2, 1, 3, 24, 6), (3, 0, 2, 64, 9), (1, 2, 2, 128, 3)],
)
def test_compaction_moves_what_the_plain_one_moves(
    batch: int, first_slot: int, heads: int, size: int, slots: int, dtype: torch.dtype
) -> None:
    """Paths are random, and some so dense that nearly every source is another's target."""
    for nodes in (slots, slots + 2, 64):
        ours, plain = (new_cache(slots=4, heads=heads, size=size, dtype=dtype) for _ in range(2))
        ours.store.copy_(plain.store)
        offsets = torch.randint(0, 90 - nodes, (batch,), device=DEVICE)
        kept = torch.stack([torch.randperm(nodes, device=DEVICE)[:slots].sort().values for _ in range(batch)])
        kept[:, 0] = 0
        length = torch.randint(1, slots + 1, (batch, 1), device=DEVICE)
        kept = torch.where(torch.arange(slots, device=DEVICE) < length, kept, -1)
        plain.compact(first_slot=first_slot, offsets=offsets, kept=kept)
        step_triton.compact(ours.store[:, first_slot:], offsets, kept)
        assert torch.equal(ours.store, plain.store)


def test_compaction_reads_all_before_it_writes_in_any_order_of_the_kept() -> None:
    ours, plain = (new_cache(slots=1, heads=1, size=8, dtype=torch.float32) for _ in range(2))
    ours.store.copy_(plain.store)
    for kept in ([3, 2, 1, 0], [1, 2, 3, 0], [0, 0, 3, 2]):
        for cache, move in ((plain, plain.compact), (ours, compact_of(ours))):
            move(first_slot=0, offsets=torch.tensor([5], device=DEVICE), kept=torch.tensor([kept], device=DEVICE))
            assert torch.equal(cache.store, plain.store)


def compact_of(cache: KVCache) -> Any:
    return lambda first_slot, offsets, kept: step_triton.compact(cache.store[:, first_slot:], offsets, kept)


MODEL = tiny_backbone("llama", seed=3, num_hidden_layers=2)
MODEL.model.to(DEVICE)
HEADS = random_heads(MODEL).to(DEVICE)


def decoder_of(tree: Tree | DynamicTree, monkeypatch: pytest.MonkeyPatch, *, fused: bool) -> Decoder:
    """Its layers are the generic ones either way."""
    monkeypatch.setattr(Backbone, "fuses_steps", fused)
    made = Decoder(MODEL, HEADS, tree, num_slots=3, context_length=100, graphs=False)
    made._looks_at_data = False  # as on a GPU
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "live"), [(1, 1), (2, 1), (3, 0), (3, 2), (3, 3)])
@pytest.mark.parametrize(("nodes", "depth", "width"), [(1, 0, 8), (6, 2, 40), (20, 5, 576)])
def test_state_and_table_become_those_of_the_accepted_path(
    nodes: int, depth: int, width: int, batch: int, live: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = drawn_trees(batch, nodes, depth)
    accepted = Acceptance.at(
        tree, torch.randint(nodes, (batch,), device=DEVICE), torch.randint(99, (batch,), device=DEVICE)
    )
    tokens = torch.randint(99, (batch, nodes), device=DEVICE)
    hidden = torch.randn(batch, nodes, width).to(DEVICE, dtype)
    before = torch.randint(50, (2, 3), device=DEVICE), torch.randn(3, width).to(DEVICE, dtype)
    states = []
    for fused, bound in ((False, live), (True, live), (True, torch.tensor(live, device=DEVICE))):
        made = decoder_of(Tree.root_only(), monkeypatch, fused=fused)
        (made.lengths, made.roots), made.hidden = before[0].clone(), before[1].clone()
        table = made._settle(accepted, tokens, hidden, bound)
        states.append((table, made.lengths, made.roots, made.hidden))
    want = states[0]
    for found in states[1:]:
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(want, found, strict=True))
    assert torch.equal(want[1][live:], before[0][0, live:]), "rows that are not live stay as they are"


def counted(called: Counter[str], kernel: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        called[kernel.__name__] += 1
        return kernel(*args, **kwargs)

    return call


@pytest.mark.parametrize("tree", [Tree.root_only(), STATIC, DynamicTree(superset=STATIC, num_nodes=12)], ids=str)
@pytest.mark.parametrize(
    "params", [{}, dict(tree_nodes=4), dict(temperature=0.8), dict(temperature=0.9, acceptance="rejection")], ids=str
)
def test_whole_steps_are_the_plain_ones(
    params: dict[str, Any], tree: Tree | DynamicTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = SamplingRows.of([SamplingParams(**params, seed=n) for n in range(3)], DEVICE)
    called = Counter[str]()
    for name in ("walk", "compact", "settle"):
        monkeypatch.setattr(step_triton, name, counted(called, getattr(step_triton, name)))
    decoders, emitted = [], []
    for fused in (False, True):
        made = decoder_of(tree, monkeypatch, fused=fused)
        told = [made.prefill(0, [[3, 1, 4], [1, 5], [9, 2, 6, 5]], rows).tokens]
        told += [made.step(3, rows, live=live).tokens for live in (3, 2, 3, 1, 3, 3, 2, 3)]
        decoders.append(made)
        emitted.append(told)
    plain, ours = decoders
    walks = 9 if params.keys() <= {"tree_nodes"} else 0  # the first token's too
    assert called == Counter(walk=walks, compact=8 if tree.num_nodes > 1 else 0, settle=8)
    assert emitted[0] == emitted[1]
    for name in ("lengths", "roots", "hidden"):
        assert torch.equal(getattr(plain, name), getattr(ours, name)), name
    assert torch.equal(plain.cache.store, ours.cache.store)
    if isinstance(tree, Tree) and tree.num_nodes > 1 and not params:
        assert any(len(tokens) > 1 for step in emitted[0] for tokens in step), "something below a root was accepted"
