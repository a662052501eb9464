"""A folder of trained heads, saved and loaded strictly. Knows files and tensors; knows no training and no registry.

config.json                 format, shape of the heads, backbone name and fingerprint, default tree size, measured accuracy
medusa_heads.safetensors    heads.{k}.blocks.{l}.weight [D,D], .bias [D]; heads.{k}.lm_head.weight [V,D] where own;
                            hydra heads' first blocks [D,(k+2)·D], k from 0: the root and k tokens beside the hidden state;
                            vocabulary [M]: the token ids that heads guess among, where not all
adapters.safetensors        where the backbone was tuned with the heads (MEDUSA-2): see adapters.py
tree.json                   paths in growth order: the first n − 1 are the best tree of n nodes
README.md                   the model card
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path as FilePath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from medusa.adapters import Adapters, load_adapters, save_adapters
from medusa.backbone import Backbone
from medusa.config import MAX_HEADS, HeadsConfig
from medusa.dynamic_tree import DynamicTree, superset_tree
from medusa.errors import CheckpointError
from medusa.folders import whole_folder
from medusa.heads import MedusaHeads
from medusa.model_card import card_text
from medusa.tree import Path, Tree

FORMAT = "medusa-ray/1"
VOCABULARY = "vocabulary"
DTYPE = torch.bfloat16
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
WEIGHTS, CONFIG, TREE, CARD = "medusa_heads.safetensors", "config.json", "tree.json", "README.md"
_NAME = re.compile(r"heads\.(\d{1,9})\.(?:blocks\.(\d{1,9})\.(weight|bias)|lm_head\.weight)")


@dataclass(kw_only=True)
class Checkpoint:
    """Heads with all that is known of them. `paths` are in growth order; `accuracy` [K][R] is held-out, where measured.

    `temperatures` [K] make the heads' probabilities true, where fitted (confidence.py): dynamic trees go by them. With
    `adapters` the heads belong to a tuned backbone; name and fingerprint are still those of the original. `dtype` is that
    of the files: saved in it again, nothing is rounded.
    """

    heads: MedusaHeads
    paths: list[Path]
    backbone_name: str
    backbone_fingerprint: str
    default_nodes: int | None = None
    accuracy: list[list[float]] | None = None
    temperatures: tuple[float, ...] | None = None
    adapters: Adapters | None = None
    card: dict[str, Any] = field(default_factory=dict)
    folder: FilePath | None = None
    dtype: torch.dtype = DTYPE

    def tree(self, num_nodes: int | None = None) -> Tree:
        """The best tree of `num_nodes` nodes, the root included (default: the checkpoint's own choice), in growth order:
        its first n nodes are the best tree of n."""
        wanted = num_nodes or self.default_nodes or len(self.paths) + 1
        if not 1 <= wanted <= len(self.paths) + 1:
            raise ValueError(f"tree must have 1 to {len(self.paths) + 1} nodes with these heads, got {wanted}")
        return Tree.grown(self.paths[: wanted - 1])

    def dynamic_tree(self, num_nodes: int | None = None) -> DynamicTree:
        """The best nodes of a large tree for each context, as many as `tree` has (or all there are, if fewer)."""
        superset = superset_tree(self.accuracy, self.paths)
        own = min(self.default_nodes or len(self.paths) + 1, superset.num_nodes)
        return DynamicTree(
            superset=superset, num_nodes=own if num_nodes is None else num_nodes, temperatures=self.temperatures
        )


def save_checkpoint(
    folder: str | FilePath,
    heads: MedusaHeads,
    *,
    paths: Sequence[Path],
    backbone_name: str,
    backbone_fingerprint: str,
    default_nodes: int | None = None,
    accuracy: Sequence[Sequence[float]] | Tensor | None = None,
    temperatures: Sequence[float] | None = None,
    adapters: Adapters | None = None,
    card: dict[str, Any] | None = None,
    dtype: torch.dtype = DTYPE,
) -> FilePath:
    """Write the folder, whole or not at all; an existing one is replaced. `card` is free text by heading for README.md.

    ValueError where tree, `default_nodes` or `accuracy` fit neither the heads nor one another.
    """
    target = FilePath(folder)
    rows = accuracy.tolist() if isinstance(accuracy, Tensor) else accuracy
    _check_tree(paths, heads, default_nodes=default_nodes, accuracy=rows)
    config = {
        "format": FORMAT,
        "num_heads": heads.config.num_heads,
        "num_layers": heads.config.num_layers,
        "lm_heads": heads.config.lm_heads,
        "kind": heads.config.kind,
        "hidden_size": heads.hidden_size,
        "vocab_size": heads.vocab_size,
        "backbone_name": backbone_name,
        "backbone_fingerprint": backbone_fingerprint,
        "default_nodes": default_nodes,
        "accuracy": [[round(float(x), 5) for x in row] for row in rows] if rows is not None else None,
        "temperatures": list(temperatures) if temperatures is not None else None,
        "adapters": adapters.describe() if adapters is not None else None,
        "card": card or {},
    }
    with whole_folder(target) as made:
        weights = {name: weight.detach().to(dtype).cpu().contiguous() for name, weight in heads.named_parameters()}
        if heads.vocabulary is not None:
            weights[VOCABULARY] = heads.vocabulary.to(torch.int32).cpu()
        save_file(weights, made / WEIGHTS, metadata={"format": FORMAT})
        if adapters is not None:
            save_adapters(made, adapters, dtype=dtype)
        (made / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        (made / TREE).write_text(json.dumps({"paths": [list(path) for path in paths]}) + "\n")
        (made / CARD).write_text(card_text(config))
    return target


def load_checkpoint(
    folder: str | FilePath,
    *,
    backbone: Backbone | None = None,
    force: bool = False,
    dtype: torch.dtype | None = None,
) -> Checkpoint:
    """Read a folder strictly. Raises CheckpointError for anything missing, unexpected, mis-shaped or foreign.

    K and the number of layers are read from the tensors. With `backbone`, its fingerprint must match (unless `force`)
    and its shapes must (always); the heads come in its step dtype on its device and, unless another `dtype` is asked
    for, with weights laid out for decoding as its own are. Without, they come in float32, or in the files' type where
    that is wider.
    """
    root = FilePath(folder)
    if not root.is_dir():
        raise CheckpointError(f"no heads folder at {root}; give a folder with {WEIGHTS} and {CONFIG}")
    config = _read_json(root / CONFIG)
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{root / CONFIG} has format {config.get('format')!r}, expected {FORMAT!r}: not a heads checkpoint "
            "(`medusa import` makes one of other systems' heads)"
        )
    weights = _read_weights(root / WEIGHTS)
    vocabulary = weights.pop(VOCABULARY, None)
    shape, hidden_size, vocab_size = _infer(weights, config, root / WEIGHTS)
    adapters = load_adapters(root, config.get("adapters"))
    stored = widest((*weights.values(), *(adapters.tensors.values() if adapters is not None else ())))
    if backbone is not None:
        _check_backbone(config, backbone, hidden_size, vocab_size, force=force)
    heads = MedusaHeads(
        shape,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        vocabulary=_check_vocabulary(vocabulary, shape, vocab_size, root / WEIGHTS),
        dtype=dtype or (backbone.step_dtype if backbone else torch.promote_types(stored, torch.float32)),
        device=backbone.device if backbone else None,
    )
    _load_strictly(heads, weights, root / WEIGHTS)
    if backbone is not None and dtype is None:  # to decode with
        if backbone.packs:
            heads.pack(backbone.linear_of_guesses)
        elif backbone.device.type == "cuda":
            heads.stack()
    if adapters is not None and backbone is not None:
        adapters.check_fits(backbone.model)
    paths, default_nodes, accuracy = _read_paths(root / TREE), config.get("default_nodes"), config.get("accuracy")
    try:
        _check_tree(paths, heads, default_nodes=default_nodes, accuracy=accuracy)
    except ValueError as error:
        raise CheckpointError(f"{root} holds no usable tree: {error}") from None
    return Checkpoint(
        heads=heads.eval(),
        paths=paths,
        backbone_name=str(config.get("backbone_name", "")),
        backbone_fingerprint=str(config.get("backbone_fingerprint", "")),
        default_nodes=default_nodes,
        accuracy=accuracy,
        temperatures=_check_temperatures(config.get("temperatures"), heads, root / CONFIG),
        adapters=adapters,
        card=config.get("card") or {},
        folder=root,
        dtype=stored,
    )


def widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The narrowest type that holds every one of these tensors exactly."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _read_json(path: FilePath) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); the checkpoint is damaged") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _read_weights(path: FilePath) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): truncated or not safetensors") from None


def _infer(weights: dict[str, Tensor], config: dict[str, Any], path: FilePath) -> tuple[HeadsConfig, int, int]:
    """Shape of the heads from the tensors themselves; the config is believed only for what no tensor can tell."""
    matches = {name: _NAME.fullmatch(name) for name in weights}
    foreign = sorted(name for name, match in matches.items() if match is None)
    if foreign or not weights:
        raise CheckpointError(f"{path} holds unexpected tensors {foreign[:4]}: not Medusa heads of this format")
    found = [match for match in matches.values() if match]
    odd = sorted({str(weight.dtype) for weight in weights.values() if weight.dtype not in DTYPES})
    if odd:
        raise CheckpointError(f"{path} holds tensors of {', '.join(odd)}; heads are stored in bfloat16 to float64")
    layers = [int(match[2]) for match in found if match[2]]
    first = weights.get("heads.0.blocks.0.weight")
    if not layers or first is None or first.dim() != 2:
        raise CheckpointError(f"{path} holds no residual block; expected heads.0.blocks.0.weight [D,D]")
    own = [weights[name] for name, match in matches.items() if match and not match[2]]
    if any(lm_head.dim() != 2 for lm_head in own):
        raise CheckpointError(f"{path}: the heads' lm_heads must be [V,D]; the file is damaged")
    if not own and not isinstance(config.get("vocab_size"), int):
        raise CheckpointError(f"{path.parent / CONFIG} names no vocab_size, which shared lm_heads need")
    shape = HeadsConfig(
        num_heads=max(int(match[1]) for match in found) + 1,
        num_layers=max(layers) + 1,
        lm_heads="own" if own else "shared",
        kind="hydra" if first.shape[1] == 2 * first.shape[0] else "medusa",
    )
    if max(shape.num_heads, shape.num_layers) > MAX_HEADS:
        raise CheckpointError(
            f"{path} numbers {shape.num_heads} heads of {shape.num_layers} layers; more than {MAX_HEADS} is refused"
        )
    for name, match in matches.items():
        if match and match[2] and match[3] == "weight":
            _check_block(weights[name], shape.num_read(int(match[1])) if match[2] == "0" else 0, f"{path}: {name}")
    return shape, first.shape[0], own[0].shape[0] if own else config["vocab_size"]


def _check_block(weight: Tensor, num_read: int, name: str) -> None:
    want = "square" if not num_read else f"[D,{1 + num_read}·D], as a hydra head's"
    if weight.dim() != 2 or weight.shape[1] != (1 + num_read) * weight.shape[0]:
        raise CheckpointError(f"{name} must be {want}, got {list(weight.shape)}; the file is damaged")


def _check_tree(paths: Sequence[Path], heads: MedusaHeads, *, default_nodes: Any, accuracy: Any) -> None:
    """ValueError unless paths, default size and accuracy [K][R] are such, and fit the heads and one another."""
    tree = Tree.grown(paths)
    tree.check_fits(num_heads=heads.num_heads, vocab_size=heads.num_choices)
    if tree.num_nodes != len(paths) + 1:
        raise ValueError(f"{len(paths)} tree paths make {tree.num_nodes - 1} nodes; leave out empty ones and doubles")
    if default_nodes is not None and (
        not isinstance(default_nodes, int)
        or isinstance(default_nodes, bool)
        or not 1 <= default_nodes <= tree.num_nodes
    ):
        raise ValueError(f"default_nodes must lie in [1, {tree.num_nodes}] with this tree, got {default_nodes!r}")
    if accuracy is None:
        return
    num_ranks = 1 + max((rank for path in paths for rank in path), default=0)
    if (
        not isinstance(accuracy, Sequence)
        or len(accuracy) != heads.num_heads
        or not all(isinstance(row, Sequence) and num_ranks <= len(row) == len(accuracy[0]) for row in accuracy)
        or not all(isinstance(one, (int, float)) and 0 <= one <= 1 for row in accuracy for one in row)
    ):
        raise ValueError(
            f"accuracy must be {heads.num_heads} rows of equally many numbers in [0, 1], {num_ranks} or more for this tree, "
            f"got {str(accuracy)[:80]}"
        )


def _check_temperatures(value: Any, heads: MedusaHeads, path: FilePath) -> tuple[float, ...] | None:
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) != heads.num_heads
        or not all(isinstance(one, (int, float)) and 0 < one < float("inf") for one in value)
    ):
        raise CheckpointError(f"{path}: temperatures must be {heads.num_heads} numbers above 0, got {value!r}")
    return tuple(float(one) for one in value)


def _check_vocabulary(ids: Tensor | None, shape: HeadsConfig, vocab_size: int, path: FilePath) -> Tensor | None:
    if ids is None:
        return None
    if shape.lm_heads == "own":
        raise CheckpointError(f"{path} holds a vocabulary, which heads with lm_heads of their own cannot have")
    wide = ids.long()
    if ids.dim() != 1 or not len(ids) or (wide.diff() <= 0).any() or wide[0] < 0 or wide[-1] >= vocab_size:
        raise CheckpointError(f"{path}: vocabulary must be ascending token ids below {vocab_size}; the file is damaged")
    return wide


def _check_backbone(
    config: dict[str, Any], backbone: Backbone, hidden_size: int, vocab_size: int, *, force: bool
) -> None:
    name = config.get("backbone_name")
    if (hidden_size, vocab_size) != (backbone.hidden_size, backbone.vocab_size):
        raise CheckpointError(
            f"these heads fit hidden size {hidden_size} and vocabulary {vocab_size} (backbone {name}); backbone "
            f"{backbone.name} has {backbone.hidden_size} and {backbone.vocab_size}"
        )
    if config.get("backbone_fingerprint") != backbone.fingerprint and not force:
        raise CheckpointError(
            f"these heads were trained on backbone {name} with fingerprint {config.get('backbone_fingerprint')}; "
            f"{backbone.name} has {backbone.fingerprint}. Load that backbone, or pass force (--force) to use them anyway"
        )


def _load_strictly(heads: MedusaHeads, weights: dict[str, Tensor], path: FilePath) -> None:
    expected = dict(heads.named_parameters())
    missing = sorted(expected.keys() - weights.keys())
    unexpected = sorted(weights.keys() - expected.keys())
    misshaped = sorted(n for n in expected.keys() & weights.keys() if expected[n].shape != weights[n].shape)
    if missing or unexpected or misshaped:
        told = [f"{kind}: {', '.join(names)}" for kind, names in
                (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped)) if names]  # fmt: skip
        raise CheckpointError(f"{path} does not hold a whole set of heads; {'; '.join(told)}")
    broken = sorted(name for name, weight in weights.items() if not weight.isfinite().all())
    if broken:
        raise CheckpointError(f"{path} holds NaN or infinite values in {', '.join(broken)}")
    heads.load_state_dict(weights, strict=True)


def _read_paths(path: FilePath) -> list[Path]:
    value = _read_json(path).get("paths")
    try:
        return [tuple(int(rank) for rank in ranks) for ranks in value]  # type: ignore[union-attr]
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no usable tree: {error}") from None
