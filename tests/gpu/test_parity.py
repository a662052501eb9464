"""On a GPU every scheme decodes what the CPU decodes in float32, and the same tree law holds there in bf16's own terms.

Needs CUDA; runs from medusa/ alone (no Ray, DeepSpeed or MLflow).
"""

from __future__ import annotations

import pytest
import torch

from medusa.backbone import Backbone
from medusa.config import SamplingParams
from medusa.engine import Engine, Request
from medusa.tree import Tree
from tests.tiny_models import FAMILIES, make_tiny_backbone_model, make_tiny_tokenizer
from tests.unit.medusa.tiny import random_heads

TREE = Tree.full([12, 4, 2])
PROMPTS = [[3, 5, 7, 9], [4] * 17, [8]]


def answers(family: str, device: str, dtype: torch.dtype, tree: Tree, scheme: str) -> list[list[int]]:
    model = make_tiny_backbone_model(family, 3, dtype, vocab_size=12)
    backbone = Backbone(model=model.to(device), tokenizer=make_tiny_tokenizer(), name=family)  # type: ignore[arg-type]
    heads = random_heads(backbone).to(device)
    engine = Engine(backbone, heads, tree=tree, max_batch_size=3, context_length=96)
    params = SamplingParams(
        max_tokens=24,
        temperature=0.0 if scheme == "greedy" else 0.9,
        acceptance=scheme,
        ignore_eos=True,  # type: ignore[arg-type]
    )
    requests = [Request(prompt_ids=p, params=params, request_id=str(i)) for i, p in enumerate(PROMPTS)]
    done = {completion.request_id: completion.token_ids for completion in engine.run(requests)}
    return [done[str(i)] for i in range(len(PROMPTS))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["greedy", "typical", "rejection"])
def test_the_gpu_decodes_what_the_cpu_decodes(family: str, scheme: str) -> None:
    cpu, gpu = (answers(family, device, torch.float32, TREE, scheme) for device in ("cpu", "cuda"))
    assert gpu == cpu


@pytest.mark.parametrize("scheme", ["greedy", "rejection"])
def test_a_tree_changes_no_answer_on_the_gpu(scheme: str) -> None:
    plain, tree = (answers("llama", "cuda", torch.float32, t, scheme) for t in (Tree.root_only(), TREE))
    assert tree == plain


def test_bf16_runs_and_mostly_agrees_with_float32() -> None:
    """Near-ties may flip a token and everything after it, so only the beginning is compared."""
    low, high = (answers("llama", "cuda", dtype, TREE, "greedy") for dtype in (torch.bfloat16, torch.float32))
    assert sum(a[:3] == b[:3] for a, b in zip(low, high, strict=True)) >= 2
