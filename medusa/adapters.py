"""What MEDUSA-2 changed in a backbone: low-rank adapters, or whole weights. Knows tensors and files, no training library.

    O outputs and I inputs of a linear layer, r rank
lora: {module}.lora_A.weight [r,I], {module}.lora_B.weight [O,r]; merged, W [O,I] becomes W + alpha / r · B·A
full: {parameter}, the tuned weight itself
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medusa.errors import CheckpointError

ADAPTERS = "adapters.safetensors"
Kind = Literal["lora", "full"]
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """A tuned backbone as its difference from the original. `rank` and `alpha` are those of LoRA, 0 for whole weights."""

    kind: Kind
    tensors: dict[str, Tensor]
    rank: int = 0
    alpha: float = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def modules(self) -> list[str]:
        """The adapted linear layers, or the tuned parameters."""
        return sorted(name.removesuffix(_A) for name in self.tensors if self.kind == "full" or name.endswith(_A))

    def check_fits(self, model: nn.Module) -> None:
        """CheckpointError, naming the first fault, where these are not adapters of `model`."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in self.modules:
            target = parameters.get(name if self.kind == "full" else f"{name}.weight")
            if target is None:
                raise CheckpointError(f"the adapters tune {name!r}, which this backbone does not have")
            if self.kind == "full":
                shape = tuple(self.tensors[name].shape)
            else:
                shape = (self.tensors[name + _B].shape[0], self.tensors[name + _A].shape[1])
            if shape != tuple(target.shape):
                raise CheckpointError(
                    f"the adapters of {name!r} have shape {shape}, the backbone's {tuple(target.shape)}"
                )
            if self.kind == "lora" and _is_embedding(model, target):
                raise CheckpointError(
                    f"the adapters tune {name!r}, which is tied to the embeddings and would change them"
                )

    @torch.no_grad()
    def merge_into(self, model: nn.Module) -> None:
        """Change the model's weights for good; sums are made in float32 or more."""
        self.check_fits(model)
        parameters = dict(model.named_parameters())
        for name in self.modules:
            if self.kind == "full":
                parameters[name].copy_(self.tensors[name])
                continue
            weight = parameters[f"{name}.weight"]
            wide = torch.promote_types(weight.dtype, torch.float32)
            down, up = (self.tensors[name + end].to(weight.device, wide) for end in (_A, _B))
            weight.copy_(torch.addmm(weight.to(wide), up, down, alpha=self.scale))

    def describe(self) -> dict[str, Any]:
        """The entry in the checkpoint's config.json."""
        return {"kind": self.kind, "rank": self.rank, "alpha": self.alpha}


def save_adapters(folder: Path, adapters: Adapters, *, dtype: torch.dtype) -> None:
    weights = {name: t.detach().to("cpu", dtype).contiguous() for name, t in adapters.tensors.items()}
    save_file(weights, folder / ADAPTERS, metadata={"format": "medusa-ray-adapters/1"})


def load_adapters(folder: Path, entry: Any) -> Adapters | None:
    """The adapters of a checkpoint folder whose config.json says `entry`; None where both say that there are none.

    Raises CheckpointError where one has what the other lacks, and for anything missing, unexpected or mis-shaped.
    """
    path = folder / ADAPTERS
    if entry is None:
        if path.exists():
            raise CheckpointError(f"{path} is there but config.json names no adapters; the checkpoint is damaged")
        return None
    if not isinstance(entry, dict) or entry.get("kind") not in get_args(Kind):
        raise CheckpointError(f"{folder / 'config.json'} names adapters of an unknown kind: {entry!r}")
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): truncated or not safetensors") from None
    broken = sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())
    if broken or not tensors:
        raise CheckpointError(
            f"{path} holds {'NaN or infinite values in ' + ', '.join(broken[:4]) if broken else 'nothing'}"
        )
    if entry["kind"] == "full":
        return Adapters(kind="full", tensors=tensors)
    rank, alpha = entry.get("rank"), entry.get("alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)) or not alpha > 0:
        raise CheckpointError(f"{folder / 'config.json'}: adapters need a rank and an alpha above 0, got {entry!r}")
    _check_pairs(tensors, rank, path)
    return Adapters(kind="lora", tensors=tensors, rank=rank, alpha=float(alpha))


def _check_pairs(tensors: dict[str, Tensor], rank: int, path: Path) -> None:
    """CheckpointError unless every A has its B and both are matrices of this rank."""
    foreign = sorted(name for name in tensors if not name.endswith((_A, _B)))
    if foreign:
        raise CheckpointError(f"{path} holds unexpected tensors {foreign[:4]}: not adapters of this format")
    downs, ups = ({name.removesuffix(end) for name in tensors if name.endswith(end)} for end in (_A, _B))
    missing = sorted([name + _B for name in downs - ups] + [name + _A for name in ups - downs])
    if missing:
        raise CheckpointError(f"{path} does not hold whole adapters; missing: {', '.join(missing[:4])}")
    for name in sorted(downs):
        down, up = tensors[name + _A], tensors[name + _B]
        if down.dim() != 2 or up.dim() != 2 or down.shape[0] != rank or up.shape[1] != rank:
            raise CheckpointError(
                f"{path}: adapters of {name!r} must have rank {rank}, got {list(down.shape)} and {list(up.shape)}"
            )


def _is_embedding(model: nn.Module, weight: Tensor) -> bool:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return embeddings is not None and embeddings.weight is weight
