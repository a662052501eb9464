"""The reference implementation's three layouts (FasterDecoding/Medusa). Knows its files; knows nothing of where they go.

    K heads, L residual blocks of each, V vocabulary, D hidden
    medusa_lm_head.pt             first version: {k}.{l}.linear.weight [D,D], .bias [D]; {k}.{L}.weight [V,D], its own lm_head
    medusa_lm_head.safetensors    second version: blocks alone, the backbone's lm_head is shared (others put own ones here too)
    a whole model's folder        MEDUSA-2: the same names behind "medusa_head.", beside the tuned backbone's weights

The first two have a config.json with `medusa_num_heads`, `medusa_num_layers` and the backbone's name; published ones are
known to give wrong numbers there, so the tensors decide. Trees stand in its source; ours go into medusa_choices.json.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from medusa.backbone import Backbone
from medusa.errors import CheckpointError
from medusa.formats.files import read_json, read_model, read_tensors
from medusa.formats.naming import REFERENCE, REFERENCE_FULL, HeadTensors, name_blocks, name_lm_heads, read_heads
from medusa.heads import MedusaHeads

PICKLE, SAFETENSORS = "medusa_lm_head.pt", "medusa_lm_head.safetensors"
PREFIX = "medusa_head."


def write_pickle(folder: Path, heads: MedusaHeads, backbone: Backbone) -> None:
    """The first version. Every head gets an lm_head of its own, a copy of the backbone's where it has none."""
    lm_head = backbone.lm_head_weight.to(next(heads.parameters()).dtype)
    torch.save(name_blocks(heads, REFERENCE) | name_lm_heads(heads, REFERENCE, lm_head), folder / PICKLE)
    _write_config(folder, _config(heads, backbone))


def write_safetensors(folder: Path, heads: MedusaHeads, backbone: Backbone) -> None:
    """The second version, for heads that share the backbone's lm_head. ValueError for others."""
    if heads.config.lm_heads == "own":
        raise ValueError(
            "reference-safetensors holds heads that share the backbone's lm_head, and these have lm_heads of their own; "
            "use reference-pt"
        )
    save_file(name_blocks(heads, REFERENCE), folder / SAFETENSORS, metadata={"format": "pt"})
    _write_config(folder, _config(heads, backbone) | {"version": "2"})


def write_full(folder: Path, heads: MedusaHeads, backbone: Backbone) -> None:
    """The backbone as it stands, tuned or not, with the heads in it and the tokenizer beside it."""
    model: Any = backbone.model
    lm_head = backbone.lm_head_weight.to(next(heads.parameters()).dtype)
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in model.named_parameters()}
    tensors |= name_blocks(heads, REFERENCE_FULL) | name_lm_heads(heads, REFERENCE_FULL, lm_head)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.config)
    config.medusa_num_heads, config.medusa_num_layers = heads.config.num_heads, heads.config.num_layers
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)


def read_alone(path: Path) -> HeadTensors:
    """Heads from a file of the first or second version, also where its names carry the prefix of a whole model."""
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in read_tensors(path).items()}
    return read_heads(tensors, REFERENCE, path)


def read_full(folder: Path) -> HeadTensors:
    """The heads in a whole model's folder; its backbone is not read."""
    return read_heads(read_model(folder, lambda name: name.startswith(PREFIX)), REFERENCE_FULL, folder)


def read_backbone(folder: Path, model: Any) -> dict[str, Tensor]:
    """The weights of a whole model's backbone by the names of `model`'s parameters, strictly. CheckpointError.

    A second name of a tied weight and rotary tables, which are computed and not trained, are left out.
    """
    tensors = read_model(folder, _not(lambda name: name.startswith(PREFIX) or name.endswith("rotary_emb.inv_freq")))
    expected: Mapping[str, Tensor] = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - expected.keys()
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys() - tied)
    misshaped = sorted(n for n in expected.keys() & tensors.keys() if expected[n].shape != tensors[n].shape)
    kinds = (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
    told = [f"{kind}: {', '.join(names)}" for kind, names in kinds if names]
    if told:
        raise CheckpointError(f"{folder} does not hold a model like the backbone given; {'; '.join(told)}")
    return {name: tensors[name] for name in expected}


def config_notes(folder: Path, heads: HeadTensors) -> list[str]:
    """Where config.json gives other numbers than the tensors."""
    config = read_json(folder / "config.json")
    counts = (("heads", "medusa_num_heads", heads.num_heads), ("layers", "medusa_num_layers", heads.num_layers))
    return [
        f"config.json's {key} is {config[key]}, the tensors hold {count} {what}; the tensors count"
        for what, key, count in counts
        if key in config and config[key] != count
    ]


def repeats_one_block(heads: MedusaHeads) -> bool:
    """Are all blocks of each head equal? The reference makes one block and runs it L times, whatever a file holds."""
    return all(
        torch.equal(getattr(block, part), getattr(head.blocks[0], part))  # type: ignore[union-attr,index]
        for head in heads.heads
        for block in head.blocks  # type: ignore[union-attr]
        for part in ("weight", "bias")
    )


def _config(heads: MedusaHeads, backbone: Backbone) -> dict[str, object]:
    return {
        "medusa_num_heads": heads.config.num_heads,
        "medusa_num_layers": heads.config.num_layers,
        "base_model_name_or_path": backbone.name,
    }


def _write_config(folder: Path, config: dict[str, object]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _not(test: Callable[[str], bool]) -> Callable[[str], bool]:
    return lambda name: not test(name)
