"""Our heads into another system's files. What a format cannot hold is refused by name, or left out when forced."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from medusa.backbone import Backbone
from medusa.checkpoint import Checkpoint
from medusa.folders import whole_folder
from medusa.formats.choices import CHOICES, choices_from_paths
from medusa.formats.reference import repeats_one_block, write_full, write_pickle, write_safetensors
from medusa.formats.vllm import write_vllm
from medusa.heads import MedusaHeads

Writer = Callable[[Path, MedusaHeads, Backbone], None]

WRITERS: dict[str, Writer] = {
    "vllm": write_vllm,
    "vllm-token-map": partial(write_vllm, token_map=True),
    "reference-pt": write_pickle,
    "reference-safetensors": write_safetensors,
    "reference-full": write_full,
}
VLLM_LAYOUTS = ("vllm", "vllm-token-map")
FORMATS = ("reference", *WRITERS)  # "reference" is the one of its layouts that fits the heads


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written where, and what the user should know of it."""

    folder: Path
    format: str
    notes: tuple[str, ...]


def check_request(format: str, *folders: Path) -> None:
    """ValueError for what can be refused before anything is loaded: an unknown format, a folder that exists."""
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}")
    for folder in folders:
        if folder.exists():
            raise ValueError(f"{folder} exists; give a new folder")


def export_heads(
    target: str | Path,
    checkpoint: Checkpoint,
    backbone: Backbone,
    *,
    format: str,
    num_nodes: int | None = None,
    backbone_saved: bool = False,
    force: bool = False,
) -> Exported:
    """Write heads (and, for reference-full, the backbone) into a new folder, whole or not at all.

    `backbone` is what `medusa.load` made of it: adapters merged. Tensors keep the type they are loaded in. `num_nodes`
    cuts the tree that the reference's layouts get, default the checkpoint's choice. `backbone_saved` says that a tuned
    backbone is stored elsewhere. ValueError for an unknown format, a target that exists, hydra heads, and what the format
    cannot hold; `force` leaves the latter out where that is possible.
    """
    folder = Path(target)
    check_request(format, folder)
    if checkpoint.heads.config.kind == "hydra":
        raise ValueError(
            f"format {format} cannot hold hydra heads: what reads it runs plain Medusa heads, which see no path; "
            "export heads of kind medusa"
        )
    layout = _fitting_layout(checkpoint) if format == "reference" else format
    if checkpoint.adapters is not None and layout != "reference-full" and not backbone_saved:
        raise ValueError(
            f"these heads belong to a tuned backbone (MEDUSA-2), which format {layout} does not hold; use reference-full, "
            "or save the backbone too (--backbone-to FOLDER)"
        )
    lost = _not_held(layout, checkpoint.heads)
    if lost and not force:
        raise ValueError(f"format {layout} cannot hold these heads: {'; '.join(lost)}; --force exports them without")
    size = checkpoint.tree(num_nodes).num_nodes
    choices = None if layout in VLLM_LAYOUTS else choices_from_paths(checkpoint.paths[: size - 1])
    notes = [f"not held by format {layout}: {what}" for what in lost]
    if layout == "vllm" and checkpoint.heads.vocabulary is not None:
        notes.append(
            f"in vLLM the heads guess among all tokens instead of {checkpoint.heads.num_choices}, since its current versions "
            "load no token_map; older ones take --format vllm-token-map"
        )
    with whole_folder(folder) as made:
        WRITERS[layout](made, checkpoint.heads, backbone)
        if choices is not None:
            (made / CHOICES).write_text(json.dumps(choices) + "\n", encoding="utf-8")
        elif num_nodes is not None:
            notes.append("vLLM proposes the chain of best guesses; the tree is not written")
    return Exported(folder=folder, format=layout, notes=tuple(notes))


def save_backbone(target: str | Path, backbone: Backbone) -> None:
    """The backbone as it stands, adapters merged, as a transformers folder. ValueError for a target that exists."""
    folder = Path(target)
    if folder.exists():
        raise ValueError(f"{folder} exists; give a new folder")
    with whole_folder(folder) as made:
        backbone.model.save_pretrained(made)
        backbone.tokenizer.save_pretrained(made)


def _fitting_layout(checkpoint: Checkpoint) -> str:
    if checkpoint.adapters is not None:
        return "reference-full"
    return "reference-safetensors" if checkpoint.heads.config.lm_heads == "shared" else "reference-pt"


def _not_held(layout: str, heads: MedusaHeads) -> list[str]:
    """What of these heads the layout has no place for."""
    if layout in VLLM_LAYOUTS:
        return []
    lost = []
    if heads.vocabulary is not None:
        lost.append(f"they guess among {heads.num_choices} tokens, and this layout's among all {heads.vocab_size}")
    if not repeats_one_block(heads):
        lost.append(
            f"their {heads.config.num_layers} layers differ, and the reference implementation runs one layer "
            f"{heads.config.num_layers} times (readers such as TensorRT-LLM keep them apart)"
        )
    return lost
