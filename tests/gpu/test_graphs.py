"""On a GPU, replayed graphs decode what eager steps decode, and the Triton kernel attends as the masked one does.

Needs CUDA; runs from medusa/ alone. `engine_answers` runs on a CPU too, where graphs are not: a unit test calls it.
"""

from __future__ import annotations

import time
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F

from medusa.attention import GpuKernels, step_mask
from medusa.config import HeadKind, SamplingParams
from medusa.decoder import Decoder
from medusa.dynamic_tree import DynamicTree
from medusa.engine import Engine, Request
from medusa.fused_llama import FusedLlama
from medusa.sampling import SamplingRows
from medusa.tree import Tree
from tests.unit.medusa.tiny import random_heads, tiny_backbone

STATIC = Tree.full([6, 3, 2])
TREES = {"static": STATIC, "dynamic": DynamicTree(superset=STATIC, num_nodes=12)}
SCHEMES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "rejection": dict(temperature=0.9, acceptance="rejection"),
    "rejection top-p": dict(temperature=0.9, acceptance="rejection", top_p=0.8),
    "typical": dict(temperature=0.8),
    "typical top-k": dict(temperature=0.8, top_k=5, root="greedy"),
    "limited": dict(tree_nodes=4),
}


def engine_answers(
    device: str,
    *,
    family: str = "llama",
    fused: bool = True,
    dtype: torch.dtype = torch.float32,
    tree: str = "static",
    kind: HeadKind = "medusa",
    scheme: str = "greedy",
    graphs: bool = True,
    kernel: str = "torch",
) -> list[list[int]]:
    """Five answers through two slots; prompts begin below the border of a length bucket and end behind it."""
    backbone = tiny_backbone(family, seed=3, dtype=dtype)
    backbone.model.to(device)
    backbone.fused = FusedLlama(backbone.model, gpu_kernels=kernel) if fused else None  # type: ignore[arg-type]
    engine = Engine(
        backbone,
        random_heads(backbone, kind=kind).to(device),
        tree=TREES[tree],
        max_batch_size=2,
        context_length=200,
        graphs=graphs,
    )
    params = SamplingParams(max_tokens=24, ignore_eos=True, **SCHEMES[scheme])
    requests = [
        Request(prompt_ids=[(3 * n + i) % 12 for i in range(length)], params=params, request_id=str(n))
        for n, length in enumerate((3, 110, 20, 118, 7))
    ]
    done = {completion.request_id: completion.token_ids for completion in engine.run(requests)}
    recorded = engine.decoder.graphs
    assert (recorded is not None and len(recorded) > 0) == (graphs and device == "cuda")
    return [done[str(n)] for n in range(len(requests))]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["medusa", "hydra"])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(
    ("family", "fused"),
    [("llama", True), ("mistral", True), ("qwen2", True), ("qwen3", True), ("llama", False), ("gemma3_text", False)],
)
def test_graphs_decode_what_eager_steps_decode(
    family: str, fused: bool, tree: str, kind: HeadKind, scheme: str
) -> None:
    replayed, eager = (
        engine_answers("cuda", family=family, fused=fused, tree=tree, kind=kind, scheme=scheme, graphs=graphs)
        for graphs in (True, False)
    )
    assert replayed == eager


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_graphs_decode_what_the_cpu_decodes(kind: HeadKind, scheme: str) -> None:
    assert engine_answers("cuda", kind=kind, scheme=scheme) == engine_answers("cpu", kind=kind, scheme=scheme)


@pytest.mark.parametrize("kernel", get_args(GpuKernels))
@pytest.mark.parametrize("scheme", ["greedy", "rejection", "typical"])
def test_bf16_graphs_are_bf16_eager_and_mostly_begin_like_float32(scheme: str, kernel: str) -> None:
    """The same kernels run either way, so bfloat16 agrees with itself; near-ties may part it from float32."""
    low, eager, high = (
        engine_answers("cuda", scheme=scheme, dtype=dtype, graphs=graphs, kernel=kernel)
        for dtype, graphs in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True))
    )
    same_shapes = [a == b for a, b in zip(low, eager, strict=True)]
    assert sum(same_shapes) >= 4, "buckets differ in length, and sums of other lengths may round otherwise"
    assert sum(a[:3] == b[:3] for a, b in zip(low, high, strict=True)) >= 3


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("kind", ["medusa", "hydra"])
@pytest.mark.parametrize("scheme", ["greedy", "limited", "rejection", "typical"])
def test_all_kernels_decode_the_same(scheme: str, kind: HeadKind, family: str) -> None:
    pytest.importorskip("triton")
    for tree in TREES:
        answers = [
            engine_answers("cuda", family=family, tree=tree, kind=kind, scheme=scheme, kernel=kernel)
            for kernel in get_args(GpuKernels)
        ]
        assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize(
    ("heads", "groups", "size", "nodes"), [(32, 1, 128, 64), (3, 3, 64, 16), (8, 4, 128, 1), (2, 2, 32, 200)]
)
def test_the_triton_kernel_attends_as_the_masked_one(
    heads: int, groups: int, size: int, nodes: int, window: int | None, dtype: torch.dtype
) -> None:
    triton_attention = pytest.importorskip("medusa.tree_attention_triton")
    offsets, length = torch.tensor([0, 1, 700, 1024], device="cuda"), 1280
    parents = [max(0, (n - 1) // 3) for n in range(nodes)]
    visible = torch.eye(nodes, dtype=torch.bool, device="cuda")
    for node in range(1, nodes):
        visible[node] |= visible[parents[node]]
    query = torch.randn(4, heads, groups * nodes, size, dtype=dtype, device="cuda")
    keys, values = torch.randn(2, 4, heads, length, size, dtype=dtype, device="cuda")
    depths = visible.sum(dim=1) - 1
    mask = step_mask(offsets=offsets, depths=depths, visible=visible, length=length, dtype=torch.float32, window=window)
    wide = (x.float() for x in (query, keys, values))
    want = F.scaled_dot_product_attention(*wide, attn_mask=mask.repeat(1, 1, groups, 1))
    found = triton_attention.tree_attention(
        query, keys, values, offsets, visible.expand(4, -1, -1), depths=depths.expand(4, -1), window=window
    )
    found = found.transpose(1, 2).reshape(query.shape)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 4e-3 if dtype == torch.float16 else 2e-5
    torch.testing.assert_close(found.float(), want, rtol=tolerance, atol=tolerance)


def test_a_step_synchronises_once_and_never_while_it_is_computed() -> None:
    """CUDA's own warning on each synchronisation: an eager step of the whole tree has one, the result's transfer."""
    backbone = tiny_backbone("llama", seed=3)
    backbone.model.to("cuda")
    backbone.fused = FusedLlama(backbone.model)
    heads, rows = random_heads(backbone).to("cuda"), SamplingRows.of([SamplingParams()] * 2, torch.device("cuda"))
    for graphs in (True, False):
        decoder = Decoder(backbone, heads, STATIC, num_slots=2, context_length=128, graphs=graphs)
        decoder.prefill(0, [[3, 1, 4], [1, 5]], rows)
        decoder.step(2, rows)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="called a synchronizing") as told:
                decoder.step(2, rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len([warning for warning in told if "called a synchronizing" in str(warning.message)]) == 1


def test_a_replayed_step_is_faster_than_its_launches() -> None:
    """A tiny model's step is all launches: replaying them is what graphs are for."""
    backbone = tiny_backbone("llama", seed=3, num_hidden_layers=8)
    backbone.model.to("cuda")
    backbone.fused = FusedLlama(backbone.model)
    heads, rows = random_heads(backbone).to("cuda"), SamplingRows.of([SamplingParams()], torch.device("cuda"))
    seconds = []
    for graphs in (False, True):
        decoder = Decoder(backbone, heads, STATIC, num_slots=1, context_length=128, graphs=graphs)
        best = float("inf")
        for _ in range(10):
            decoder.pretend(1, 64)
            torch.cuda.synchronize()
            began = time.perf_counter()
            decoder.step(1, rows)
            best = min(best, time.perf_counter() - began)
        seconds.append(best)
    assert seconds[1] < seconds[0]
