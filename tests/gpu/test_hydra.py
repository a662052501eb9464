"""On a GPU hydra heads fill a tree by Triton kernels, one by one or replayed, as by PyTorch. Needs CUDA and Triton."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

from medusa.fused_llama import FusedLlama
from medusa.hydra import sequential_candidates
from medusa.proposals import Proposer
from medusa.tree import Tree
from medusa.triton_support import has_triton
from tests.unit.medusa.tiny import NUM_HEADS, random_heads, tiny_backbone

TREE = Tree.from_paths([(0,), (1,), (3,), (0, 0), (0, 2), (3, 1), (0, 2, 5), (3, 1, 0), (3, 1, 4)])


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("tree", [TREE, Tree.chain(NUM_HEADS)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_a_filled_tree_is_recorded_in_a_graph_and_follows_new_states(
    dtype: torch.dtype, tree: Tree, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_triton():
        pytest.skip("needs Triton")
    from medusa import hydra_triton

    asked = Mock(wraps=hydra_triton.path_inputs)
    monkeypatch.setattr(hydra_triton, "path_inputs", asked)
    backbone = tiny_backbone(seed=7, dtype=dtype, vocab_size=9000)
    backbone.model.to("cuda")
    backbone.fused = FusedLlama(backbone.model, gpu_kernels="fused")
    vocabulary = torch.arange(1, 9000, 2, device="cuda")
    heads = random_heads(backbone, kind="hydra", num_layers=2, vocabulary=vocabulary).to("cuda")
    propose, reader, on_gpu = Proposer(heads, backbone), backbone.lm_head_for(vocabulary), tree.on(torch.device("cuda"))
    roots = torch.zeros(batch, dtype=torch.int64, device="cuda")
    hidden = torch.zeros(batch, backbone.hidden_size, dtype=dtype, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        propose(on_gpu, roots, hidden)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed, _ = propose(on_gpu, roots, hidden)
    assert asked.call_count == 2 * NUM_HEADS
    same = []
    for _ in range(10):
        roots.random_(9000)
        hidden.normal_()
        graph.replay()
        assert torch.equal(replayed, propose(on_gpu, roots, hidden)[0])
        same.append(replayed == sequential_candidates(heads, on_gpu, roots, hidden, reader))
    shared = torch.stack(same)[..., 1:].float().mean()
    assert shared == 1 if dtype == torch.float32 else shared > 0.7, "in 16 bits other rounding may part near-ties"
