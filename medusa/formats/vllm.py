"""vLLM's `medusa` draft model: config.json and model.safetensors. Knows its files; knows nothing of where they go.

    K heads, L residual blocks of each, V vocabulary, M tokens that heads guess among, D hidden
    blocks.{k}.layers.{l}.weight [D,D], .bias [D]      read by vLLM only where `medusa_fc_bias` is true
    lm_heads.{k}.weight [V,D], or lm_head.weight for all heads where `original_lm_head` is true; [M,D] beside a token_map
    token_map [M]                                      ids of the tokens guessed among, with `truncated_vocab_size` M

vLLM skips, without a word, what it does not know by name, and proposes the chain of the heads' best guesses: a tree has no
place here. The configuration's keys are what its own MedusaConfig reads; it takes *any* key that holds "num" and "heads"
(or "layers") for the number of them, so no other such key may stand there.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from medusa.backbone import Backbone, dtype_name
from medusa.errors import CheckpointError
from medusa.formats.files import read_json, read_model
from medusa.formats.naming import VLLM, HeadTensors, belongs, name_blocks, name_lm_heads, read_heads
from medusa.heads import MedusaHeads

WEIGHTS = "model.safetensors"
SHARED_LM_HEAD, TOKEN_MAP = "lm_head.weight", "token_map"
OLD_PREFIX = "medusa_heads."  # vLLM drops it wherever it stands


def write_vllm(folder: Path, heads: MedusaHeads, backbone: Backbone, *, token_map: bool = False) -> None:
    """Write the draft model. A shared lm_head is stored once.

    With `token_map`, of the heads' vocabulary alone if they have one. Versions that check that every parameter was loaded
    (0.32 does) take no token_map; without it the heads guess among all tokens.
    """
    shared = heads.config.lm_heads == "shared"
    vocabulary = heads.vocabulary if token_map else None
    tensors = name_blocks(heads, VLLM)
    lm_head = backbone.lm_head_weight.detach()
    if shared:
        rows = lm_head if vocabulary is None else lm_head[vocabulary]
        tensors[SHARED_LM_HEAD] = rows.to(next(heads.parameters()).dtype).cpu().clone()
    else:
        tensors |= name_lm_heads(heads, VLLM, lm_head)
    if vocabulary is not None:
        tensors[TOKEN_MAP] = vocabulary.to(torch.int64).cpu()
    config = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": heads.hidden_size,
        "vocab_size": heads.vocab_size,
        "num_heads": heads.config.num_heads,
        "num_hidden_layers": heads.config.num_layers,
        "truncated_vocab_size": heads.vocab_size if vocabulary is None else len(vocabulary),
        "medusa_fc_bias": True,
        "original_lm_head": shared,
        "logit_scale": backbone.transform.scale,
        "dtype": dtype_name(next(heads.parameters()).dtype),
        "base_model_name_or_path": backbone.name,
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def is_vllm(names: set[str]) -> bool:
    """Are these the tensors of this layout?"""
    return any(belongs(name.replace(OLD_PREFIX, ""), VLLM) for name in names)


def read_vllm(folder: Path) -> tuple[HeadTensors, Tensor | None, list[str]]:
    """The heads, the ids that they guess among (None: all), and what the user should know. CheckpointError.

    One lm_head for all heads comes back as the lm_head of each.
    """
    tensors = {name.replace(OLD_PREFIX, ""): tensor for name, tensor in read_model(folder).items()}
    config = read_json(folder / "config.json")
    token_map = tensors.pop(TOKEN_MAP, None)
    common = tensors.pop(SHARED_LM_HEAD, None)
    if common is None and config.get("original_lm_head"):
        common = tensors.pop(VLLM.lm_head_name(0, 0), None)
    heads = read_heads(tensors, VLLM, folder)
    if common is not None:
        heads = _with_lm_head(heads, common, folder)
    if heads.lm_heads is None:
        raise CheckpointError(f"{folder} holds no lm_head; expected {SHARED_LM_HEAD} or {VLLM.lm_head_name(0, 0)}")
    _check_token_map(token_map, config, folder)
    notes = []
    has_bias = any(name.endswith("bias") for name in tensors)
    if has_bias and not config.get("medusa_fc_bias"):
        notes.append("the heads have biases, which are imported; vLLM ignored them, medusa_fc_bias not being set")
    if config.get("medusa_fc_bias") and not has_bias:
        raise CheckpointError(f"{folder}: config.json sets medusa_fc_bias but no block has a bias")
    return heads, token_map, notes


def _with_lm_head(heads: HeadTensors, common: Tensor, folder: Path) -> HeadTensors:
    if heads.lm_heads is not None:
        raise CheckpointError(f"{folder} holds {SHARED_LM_HEAD} beside own lm_heads; vLLM reads one kind or the other")
    if common.dim() != 2 or common.shape[1] != heads.hidden_size:
        raise CheckpointError(
            f"{folder}: {SHARED_LM_HEAD} must have shape [V, {heads.hidden_size}], got {list(common.shape)}"
        )
    return HeadTensors(weights=heads.weights, biases=heads.biases, lm_heads=[common] * heads.num_heads)


def _check_token_map(token_map: Tensor | None, config: dict[str, object], folder: Path) -> None:
    """vLLM reads a token_map only where the configuration says that the vocabulary is cut, and then wants one."""
    wanted = config.get("truncated_vocab_size")
    if token_map is not None and (token_map.dim() != 1 or token_map.is_floating_point()):
        raise CheckpointError(f"{folder}: {TOKEN_MAP} must be a list of token ids, got shape {list(token_map.shape)}")
    if token_map is not None and wanted != len(token_map):
        raise CheckpointError(
            f"{folder}: {TOKEN_MAP} has {len(token_map)} tokens, config.json's truncated_vocab_size is {wanted}"
        )
    if token_map is None and wanted is not None and wanted != config.get("vocab_size"):
        raise CheckpointError(
            f"{folder}: config.json cuts the vocabulary to {wanted} tokens but {TOKEN_MAP} is missing"
        )
