"""The Triton kernel against attention by the textbook: on a GPU, or through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton (it comes with CUDA builds of torch)")
from medusa import fused_llama
from medusa import tree_attention_triton as kernels
from medusa.config import SamplingParams
from medusa.engine import Engine, Request
from medusa.fused_llama import FusedLlama
from medusa.tree import Tree
from tests.unit.medusa.tiny import random_heads, tiny_backbone

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TREE = Tree.full([4, 2])


def reference(
    query: Tensor, keys: Tensor, values: Tensor, offsets: Tensor, visible: Tensor, *, window: int | None = None
) -> Tensor:
    """Row by row, in float64, over what each node may see and nothing else."""
    out, num_nodes = torch.zeros_like(query, dtype=torch.float64), visible.shape[-1]
    depths = visible.sum(dim=-1) - 1
    for b, prefix in enumerate(offsets.tolist()):
        for m in range(query.shape[2]):
            position = prefix + int(depths[b, m % num_nodes])
            begin = 0 if window is None else max(0, position - window + 1)
            seen = [*range(begin, prefix), *(prefix + n for n in range(num_nodes) if visible[b, m % num_nodes, n])]
            k, v, q = (x.double() for x in (keys[b, :, seen], values[b, :, seen], query[b, :, m]))
            weights = torch.softmax(torch.einsum("he,hse->hs", q, k) * query.shape[-1] ** -0.5, dim=-1)
            out[b, :, m] = torch.einsum("hs,hse->he", weights, v)
    return out


def attended(query: Tensor, *others: Tensor, num_pieces: int | None = None, window: int | None = None) -> Tensor:
    """The kernel's result, from node by node [B,N,H·G,E] back to the query's own order [B,H,G·N,E]."""
    depths = others[-1].sum(dim=-1) - 1
    found = kernels.tree_attention(query, *others, depths=depths, window=window, num_pieces=num_pieces)
    return found.transpose(1, 2).reshape(query.shape)


def case(
    groups: int, size: int, prefixes: list[int], tree: Tree, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Keys and values as the cache has them, views into something larger; what nobody may read is NaN."""
    batch, heads, num_nodes = len(prefixes), 2, tree.num_nodes
    query = torch.randn(batch, heads, groups * num_nodes, size, dtype=dtype)
    store = torch.randn(2, batch, heads, 256, size, dtype=dtype)
    for row, prefix in enumerate(prefixes):
        store[:, row, :, prefix + num_nodes :] = float("nan")
    keys, values = store[..., :200, :]
    visible = tree.ancestor_mask.expand(batch, -1, -1)
    made = query, keys, values, torch.tensor(prefixes), visible
    return tuple(x.to(DEVICE) for x in made)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("groups", "size", "prefixes", "tree", "pieces"),
    [
        (1, 16, [0, 5, 130], Tree.root_only(), 1),
        (1, 16, [64, 63, 1], Tree.root_only(), 4),
        (3, 8, [0, 70, 128], TREE, 1),
        (3, 24, [0, 70, 128], TREE, 5),
        (6, 16, [3, 60], TREE, 3),  # more query rows than one program holds
        (1, 160, [40], Tree.root_only(), 2),
    ],
)
def test_the_kernel_is_the_textbooks_attention(
    groups: int, size: int, prefixes: list[int], tree: Tree, pieces: int
) -> None:
    made = case(groups, size, prefixes, tree, torch.float32)
    found = attended(*made, num_pieces=pieces)
    torch.testing.assert_close(found.double(), reference(*made), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("window", [4, 64, 65, 100, 1000])
def test_a_window_hides_what_lies_further_back_of_each_node(window: int, pieces: int) -> None:
    made = case(3, 16, [0, 3, 70, 150], TREE, torch.float32)
    found = attended(*made, num_pieces=pieces, window=window)
    torch.testing.assert_close(found.double(), reference(*made, window=window), rtol=1e-5, atol=1e-5)


def test_each_row_may_have_its_own_tree() -> None:
    query, keys, values, offsets, _ = case(2, 16, [9, 70], Tree.chain(4), torch.float32)
    visible = torch.stack([Tree.chain(4).ancestor_mask, Tree.full([2, 1]).ancestor_mask]).to(DEVICE)
    found = attended(query, keys, values, offsets, visible)
    torch.testing.assert_close(found.double(), reference(query, keys, values, offsets, visible), rtol=1e-5, atol=1e-5)


def test_half_precision_is_summed_in_float32() -> None:
    made = case(2, 16, [100], TREE, torch.float16)
    found = attended(*made, num_pieces=2)
    torch.testing.assert_close(found.double(), reference(*made), rtol=2e-3, atol=2e-3)


def test_float64_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"float16, got torch\.float64"):
        attended(*case(1, 16, [3], TREE, torch.float64))


@pytest.mark.parametrize("window", [None, 2, 6])
@pytest.mark.parametrize("longest", [256, 4])
def test_an_engine_decodes_the_same_by_all_kernels(
    longest: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 4, prompts and the tree itself are longer than what the kernel reads: a mask serves behind the other kernels."""
    monkeypatch.setattr(fused_llama, "MAX_TRITON_NODES", longest)
    answers = []
    for kernel in ("torch", "triton", "fused"):
        backbone = tiny_backbone("mistral", seed=3, num_hidden_layers=1, sliding_window=window)
        backbone.model.to(DEVICE)
        backbone.fused = FusedLlama(backbone.model, gpu_kernels=kernel)  # type: ignore[arg-type]
        engine = Engine(backbone, random_heads(backbone).to(DEVICE), tree=TREE, max_batch_size=2, context_length=64)
        requests = [
            Request(prompt_ids=[3, 1, 4, n], params=SamplingParams(max_tokens=8, ignore_eos=True), request_id=str(n))
            for n in range(2)
        ]
        answers.append({done.request_id: done.token_ids for done in engine.run(requests)})
    assert answers[0] == answers[1] == answers[2]
