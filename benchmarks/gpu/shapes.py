"""Backbones and heads of known shapes with random weights: what a step costs depends on shapes alone. Needs no files."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from medusa.backbone import Backbone
from medusa.config import HeadsConfig
from medusa.fused_llama import FusedLlama
from medusa.heads import MedusaHeads
from medusa.tree import Tree
from medusa.tree_search import grow_paths

NUM_HEADS = 5
SHAPES: dict[str, dict[str, Any]] = {
    "vicuna-7b": dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096,
    ),
    "smollm2-135m": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192,
    ),
    "tiny": dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=300, max_position_embeddings=512,
    ),
}  # fmt: skip


def random_backbone(name: str, *, device: torch.device, dtype: torch.dtype) -> Backbone:
    """A Llama of these shapes, through the fused path. ValueError for a name that is not in SHAPES."""
    if name not in SHAPES:
        raise ValueError(f"unknown shapes {name!r}; choose one of {', '.join(SHAPES)}")
    config = LlamaConfig(**SHAPES[name], tie_word_embeddings=False, eos_token_id=None, bos_token_id=None)
    with device:  # seven billion weights are drawn where they will stay
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False)
    backbone = Backbone(model=model, tokenizer=SimpleNamespace(eos_token_id=None), name=name)
    backbone.fused = FusedLlama(backbone.model)
    return backbone


def random_heads(backbone: Backbone, lm_heads: Literal["shared", "own"]) -> MedusaHeads:
    heads = MedusaHeads(
        HeadsConfig(num_heads=NUM_HEADS, lm_heads=lm_heads),
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        dtype=backbone.dtype,
        device=backbone.device,
    )
    heads.stack()
    return heads.requires_grad_(False).eval()


def typical_tree(num_nodes: int) -> Tree:
    """The nested tree of heads about as good as the paper's: 60 % right at the next token, falling off from there."""
    ranks = torch.arange(10, dtype=torch.float64)
    accuracy = torch.stack([0.6 * 0.8**head * 0.4**ranks for head in range(NUM_HEADS)])
    return Tree.grown(grow_paths(accuracy, num_nodes))


def read_bytes(backbone: Backbone, *, rows: int, context: int) -> int:
    """What a plain step of `rows` sequences must read: every weight but the embedding's rows, and all keys and values."""
    weights = sum(weight.numel() * weight.element_size() for weight in backbone.model.parameters())
    embedding: Tensor = backbone.model.get_input_embeddings().weight  # type: ignore[assignment]
    kept = backbone.new_cache(num_slots=1, capacity=1).store  # of one position
    cache = kept.numel() * kept.element_size() * rows * context
    return weights - embedding.numel() * embedding.element_size() + cache
