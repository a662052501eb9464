"""Another system's heads into a checkpoint of ours: which layout it is, what of it is the backbone's own, and the tree."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from medusa.adapters import Adapters
from medusa.backbone import Backbone
from medusa.checkpoint import FORMAT, save_checkpoint, widest
from medusa.config import HeadsConfig
from medusa.errors import CheckpointError
from medusa.formats.choices import CHOICES, read_choices
from medusa.formats.files import MODEL_FILES, model_names, read_json
from medusa.formats.naming import HeadTensors
from medusa.formats.reference import PICKLE, PREFIX, SAFETENSORS, config_notes, read_alone, read_backbone, read_full
from medusa.formats.vllm import is_vllm, read_vllm
from medusa.heads import MedusaHeads
from medusa.tree import Path as TreePath
from medusa.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Imported:
    """The checkpoint written, the layout that was found, and what the user should know."""

    folder: Path
    format: str
    heads: HeadsConfig
    notes: tuple[str, ...]


@dataclass(kw_only=True)
class _Found:
    """What a source holds. `token_map` [M]: the only tokens that the heads guess among; `folder` may hold a tree."""

    format: str
    heads: HeadTensors
    folder: Path
    token_map: Tensor | None = None
    notes: list[str] = field(default_factory=list)


def holds_backbone(source: str | Path) -> bool:
    """Is the source a whole model with heads in it, so that it can be its own backbone?"""
    folder = Path(source)
    return folder.is_dir() and _layout(folder) == "reference-full"


def import_heads(
    source: str | Path, target: str | Path, *, backbone: Backbone, choices: str | Path | None = None
) -> Imported:
    """Read heads of any known layout strictly and write a checkpoint into a new folder.

    `backbone` is what the heads were trained on; from a whole model's folder, what differs from it is kept as adapters, so
    the folder itself or the original may be given. Load it in float32, in which any stored type is exact: lm_heads equal
    to the backbone's are stored as shared. The tree comes from `choices` (a JSON file of paths), from a medusa_choices.json
    beside the heads, or is the chain of best guesses. CheckpointError; ValueError for a target that exists.
    """
    folder = Path(target)
    if folder.exists():
        raise ValueError(f"{folder} exists; give a new folder")
    found = _read(Path(source))
    adapters = _difference(found, backbone)
    lm_head = _tuned_lm_head(backbone, adapters)
    _check_shapes(found, lm_head)
    heads = _build(found, lm_head, backbone)
    paths = _tree(found, choices, heads)
    save_checkpoint(
        folder,
        heads,
        paths=paths,
        backbone_name=backbone.name,
        backbone_fingerprint=backbone.fingerprint,
        adapters=adapters,
        card={"Origin": {"imported from": Path(source).name, "format": found.format, "notes": found.notes or "none"}},
        dtype=widest((*heads.parameters(), *(adapters.tensors.values() if adapters is not None else ()))),
    )
    return Imported(folder=folder, format=found.format, heads=heads.config, notes=tuple(found.notes))


def _layout(folder: Path) -> str:
    """The layout of a folder, from its files and the names of its tensors. CheckpointError where it is none."""
    if read_json(folder / "config.json").get("format") == FORMAT:
        raise CheckpointError(f"{folder} is a checkpoint of this project already; give it to medusa.load (--heads)")
    for name, layout in ((SAFETENSORS, "reference-safetensors"), (PICKLE, "reference-pt")):
        if (folder / name).is_file():
            return layout
    if any((folder / name).is_file() for name in MODEL_FILES):
        names = model_names(folder)
        if any(name.startswith(PREFIX) for name in names):
            return "reference-full"
        if is_vllm(names):
            return "vllm"
    raise CheckpointError(
        f"{folder} holds no Medusa heads of a known layout; expected {PICKLE}, {SAFETENSORS}, a model's folder with tensors "
        f"{PREFIX}…, or vLLM's with blocks.…"
    )


def _read(source: Path) -> _Found:
    if source.is_file():
        layout = "reference-safetensors" if source.suffix == ".safetensors" else "reference-pt"
        heads = read_alone(source)
        return _Found(format=layout, heads=heads, folder=source.parent, notes=config_notes(source.parent, heads))
    if not source.is_dir():
        raise CheckpointError(f"no file or folder at {source}; give another system's heads")
    layout = _layout(source)
    if layout == "vllm":
        heads, token_map, notes = read_vllm(source)
        return _Found(format=layout, heads=heads, folder=source, token_map=token_map, notes=notes)
    if layout == "reference-full":
        heads = read_full(source)
    else:
        heads = read_alone(source / (SAFETENSORS if layout == "reference-safetensors" else PICKLE))
    return _Found(format=layout, heads=heads, folder=source, notes=config_notes(source, heads))


def _difference(found: _Found, backbone: Backbone) -> Adapters | None:
    """What a whole model's backbone has other than `backbone`; None where they are the same or none is there."""
    if found.format != "reference-full":
        return None
    parameters = dict(backbone.model.named_parameters())
    theirs = read_backbone(found.folder, backbone.model)
    changed = {name: weight for name, weight in theirs.items() if not _same(weight, parameters[name])}
    return Adapters(kind="full", tensors=changed) if changed else None


def _tuned_lm_head(backbone: Backbone, adapters: Adapters | None) -> Tensor:
    """The lm_head [V,D] that the heads were trained beside."""
    names = [name for name, weight in backbone.model.named_parameters() if weight is backbone.lm_head_weight]
    tuned = [adapters.tensors[name] for name in names if adapters is not None and name in adapters.tensors]
    return tuned[0] if tuned else backbone.lm_head_weight.detach()


def _same(theirs: Tensor, ours: Tensor) -> bool:
    """Equal once ours is rounded as theirs was when it was stored."""
    return torch.equal(theirs, ours.detach().to(theirs.device, theirs.dtype))


def _check_shapes(found: _Found, lm_head: Tensor) -> None:
    heads, (vocab, hidden) = found.heads, lm_head.shape
    rows = heads.lm_heads[0].shape[0] if heads.lm_heads else vocab
    allowed = {vocab} if found.token_map is None else {vocab, len(found.token_map)}
    if heads.hidden_size != hidden or rows not in allowed:
        raise CheckpointError(
            f"these heads fit hidden size {heads.hidden_size} and vocabulary {rows}; the backbone has {hidden} and {vocab}"
        )


def _build(found: _Found, lm_head: Tensor, backbone: Backbone) -> MedusaHeads:
    """Our heads; lm_heads that are all the backbone's own become one shared one."""
    vocab = lm_head.shape[0]
    vocabulary = found.token_map.long() if found.token_map is not None else None
    if vocabulary is not None:
        vocabulary = vocabulary.sort().values  # the order of ids carries nothing: rows are compared below by id
        if (vocabulary.diff() <= 0).any() or vocabulary[0] < 0 or vocabulary[-1] >= vocab:
            raise CheckpointError(f"{found.folder}: token_map must name different tokens below {vocab}")
    own = found.heads.lm_heads
    shared = own is None or all(_is_lm_head(weight, lm_head, found.token_map) for weight in own)
    if not shared and vocabulary is not None:
        raise CheckpointError(
            f"{found.folder}: its lm_heads are not the backbone's and score {len(vocabulary)} tokens alone; only heads that "
            "share the backbone's lm_head can guess among some tokens here"
        )
    heads = MedusaHeads(
        HeadsConfig(
            num_heads=found.heads.num_heads, num_layers=found.heads.num_layers, lm_heads="shared" if shared else "own"
        ),
        hidden_size=backbone.hidden_size,
        vocab_size=vocab,
        vocabulary=vocabulary,
        dtype=found.heads.dtype,
    )
    found.heads.fill(heads)
    if own is not None and shared:
        found.notes.append("every lm_head equals the backbone's; they are stored as one shared")
    return heads.eval()


def _is_lm_head(weight: Tensor, lm_head: Tensor, token_map: Tensor | None) -> bool:
    if token_map is not None and weight.shape[0] == len(token_map):
        lm_head = lm_head[token_map.long()]
    return _same(weight, lm_head)


def _tree(found: _Found, choices: str | Path | None, heads: MedusaHeads) -> list[TreePath]:
    beside = found.folder / CHOICES
    file = Path(choices) if choices is not None else beside if beside.is_file() else None
    if file is None:
        found.notes.append("no tree came with the heads: they get the chain of best guesses; calibrate to choose one")
        return [(0,) * depth for depth in range(1, heads.num_heads + 1)]
    paths = read_choices(file)
    try:
        Tree.from_paths(paths).check_fits(num_heads=heads.num_heads, vocab_size=heads.num_choices)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return paths
