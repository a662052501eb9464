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
    """Heads whose every tensor is random: no two guess alike."""
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
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.3)
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
