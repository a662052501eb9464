"""Small backbones, heads and trees for the laws of decoding. A vocabulary of 12 makes random guesses right often enough."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from medusa.backbone import Backbone, Placement
from medusa.config import HeadKind, HeadsConfig
from medusa.heads import LogitTransform, MedusaHeads
from medusa.tree import Path, Tree
from tests.tiny_models import make_tiny_backbone_model, make_tiny_tokenizer

VOCAB = 12
NUM_HEADS = 3


def tiny_backbone(
    family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Backbone:
    overrides.setdefault("vocab_size", VOCAB)
    model = make_tiny_backbone_model(family, seed, dtype, **overrides)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return Backbone(
        model=model, tokenizer=make_tiny_tokenizer(), name=f"tiny-{family}", transform=LogitTransform(softcap=cap)
    )


def random_heads(
    backbone: Backbone,
    *,
    num_layers: int = 1,
    lm_heads: str = "shared",
    seed: int = 1,
    vocabulary: torch.Tensor | None = None,
    kind: HeadKind = "medusa",
) -> MedusaHeads:
    """Heads whose every tensor is random: no two guess alike. The same in every type, since they are drawn in float32: some
    versions of torch draw other numbers in 16 bits."""
    heads = MedusaHeads(
        HeadsConfig(num_heads=NUM_HEADS, num_layers=num_layers, lm_heads=lm_heads, kind=kind),  # type: ignore[arg-type]
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        vocabulary=vocabulary,
        dtype=backbone.dtype,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in heads.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return heads.eval()


@st.composite
def trees(draw: st.DrawFn, *, max_nodes: int = 24, depth: int = NUM_HEADS, width: int = 6) -> Tree:
    """A random prefix-closed tree, the root alone included."""
    known: list[Path] = [()]
    for _ in range(draw(st.integers(0, max_nodes - 1))):
        parent = draw(st.sampled_from([path for path in known if len(path) < depth]))
        path = (*parent, draw(st.integers(0, width - 1)))
        if path not in known:
            known.append(path)
    return Tree.from_paths(known)


def chain_placement(length: int, *, first_slot: int = 0, batch: int = 1, offset: int = 0, room: int = 0) -> Placement:
    steps = torch.arange(length)
    return Placement(
        first_slot=first_slot,
        offsets=torch.full((batch,), offset),
        depths=steps,
        visible=steps[:, None] >= steps,
        length=offset + length + room,
    )


# Models that the fused path computes, whose heads it edits or hides positions from.
FUSED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 3}),  # which hides nodes of a tree from each other
    ("mistral", {"sliding_window": 8}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}),
    ("qwen3", {}),
]


@torch.inference_mode()
def logits_of_prompt_and_tree(backbone: Backbone, ids: torch.Tensor) -> list[torch.Tensor]:
    """Two prompts `ids` [2,9], then a tree behind prefixes of different lengths: logits of both in float64."""
    tree = Tree.from_paths([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]).on(backbone.device)
    with backbone.device:
        prompt, offsets = chain_placement(9, batch=2), torch.tensor([9, 5])
    behind = Placement(first_slot=0, offsets=offsets, depths=tree.depths, visible=tree.ancestor_mask, length=24)
    cache = backbone.new_cache(num_slots=2, capacity=32)
    logits = []
    for part, where in ((ids, prompt), (ids[:, :7].flip(1), behind)):
        logits.append(backbone.logits(backbone.step(part.to(backbone.device), where, cache)).double())
        assert logits[-1].shape == (*part.shape, backbone.vocab_size)
    return logits
