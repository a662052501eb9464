"""What a layout calls the tensors of Medusa heads, and the heads read from such names. Knows tensors; knows no files.

K heads, L residual blocks of each, V vocabulary, D hidden
K and L are read from the names themselves. What is missing in that grid, what does not belong to it and what has another
shape is named, as the file calls it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from medusa.config import MAX_HEADS
from medusa.errors import CheckpointError
from medusa.heads import MedusaHeads


@dataclass(frozen=True, kw_only=True)
class Naming:
    """Templates with {head}, {layer} and {part} (weight or bias); for an lm_head, {layer} is L.

    `bias_optional`: a set of heads without any bias is whole, its biases being zero.
    """

    block: str
    lm_head: str
    bias_optional: bool = False

    def block_name(self, head: int, layer: int, part: str) -> str:
        return self.block.format(head=head, layer=layer, part=part)

    def lm_head_name(self, head: int, num_layers: int) -> str:
        return self.lm_head.format(head=head, layer=num_layers)


# `{head}.{layer}` number the members of torch's ModuleList and Sequential in the reference's own module tree.
REFERENCE = Naming(block="{head}.{layer}.linear.{part}", lm_head="{head}.{layer}.weight")
REFERENCE_FULL = Naming(block=f"medusa_head.{REFERENCE.block}", lm_head=f"medusa_head.{REFERENCE.lm_head}")
VLLM = Naming(block="blocks.{head}.layers.{layer}.{part}", lm_head="lm_heads.{head}.weight", bias_optional=True)


@dataclass(frozen=True, kw_only=True)
class HeadTensors:
    """`weights` [K][L] of [D,D], `biases` [K][L] of [D]; `lm_heads` [K] of [V,D], or None where they are shared."""

    weights: list[list[Tensor]]
    biases: list[list[Tensor]]
    lm_heads: list[Tensor] | None

    @property
    def num_heads(self) -> int:
        return len(self.weights)

    @property
    def num_layers(self) -> int:
        return len(self.weights[0])

    @property
    def hidden_size(self) -> int:
        return self.weights[0][0].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest type that holds every tensor exactly."""
        found = self.weights[0][0].dtype
        for tensor in chain(*self.weights, *self.biases, self.lm_heads or ()):
            found = torch.promote_types(found, tensor.dtype)
        return found

    def fill(self, heads: MedusaHeads) -> None:
        """Copy into heads of this shape; their own lm_heads, if they have any, from `lm_heads`."""
        own = {} if heads.config.lm_heads == "shared" else dict(enumerate(self.lm_heads or ()))
        state: dict[str, Tensor] = {}
        for k in range(self.num_heads):
            for layer in range(self.num_layers):
                state[f"heads.{k}.blocks.{layer}.weight"] = self.weights[k][layer]
                state[f"heads.{k}.blocks.{layer}.bias"] = self.biases[k][layer]
            if k in own:
                state[f"heads.{k}.lm_head.weight"] = own[k]
        heads.load_state_dict(state, strict=True)


def name_blocks(heads: MedusaHeads, naming: Naming) -> dict[str, Tensor]:
    """The residual blocks under the layout's names."""
    return {
        naming.block_name(k, layer, part): getattr(block, part).detach().cpu().contiguous()
        for k, head in enumerate(heads.heads)
        for layer, block in enumerate(head.blocks)  # type: ignore[arg-type]
        for part in ("weight", "bias")
    }


def name_lm_heads(heads: MedusaHeads, naming: Naming, shared: Tensor) -> dict[str, Tensor]:
    """An lm_head of its own for each head under the layout's names: a copy of `shared` [V,D] where it has none."""
    own = [shared if head.lm_head is None else head.lm_head.weight for head in heads.heads]  # type: ignore[union-attr]
    return {
        naming.lm_head_name(k, heads.config.num_layers): weight.detach().cpu().clone()  # type: ignore[operator]
        for k, weight in enumerate(own)
    }


def read_heads(tensors: Mapping[str, Tensor], naming: Naming, where: object) -> HeadTensors:
    """Heads from the tensors of a layout, strictly. CheckpointError names all that is missing, unexpected or mis-shaped."""
    blocks = _numbered(naming.block, tensors)
    lm_heads = _numbered(naming.lm_head, tensors)
    if not blocks:
        example = naming.block_name(0, 0, "weight")
        raise CheckpointError(f"{where} holds no residual block such as {example}: not Medusa heads of this layout")
    num_heads = 1 + max(int(found["head"]) for found in (*blocks, *lm_heads))
    num_layers = max([*(int(found["layer"]) + 1 for found in blocks), *(int(f.get("layer", 0)) for f in lm_heads)])
    if max(num_heads, num_layers) > MAX_HEADS:
        raise CheckpointError(
            f"{where} numbers {num_heads} heads of {num_layers} layers; more than {MAX_HEADS} is refused"
        )
    with_bias = not naming.bias_optional or any(found["part"] == "bias" for found in blocks)
    parts = ("weight", "bias") if with_bias else ("weight",)
    grid = [(k, layer, part) for k in range(num_heads) for layer in range(num_layers) for part in parts]
    own = [naming.lm_head_name(k, num_layers) for k in range(num_heads)] if lm_heads else []
    _check_names(tensors, expected=[*(naming.block_name(*place) for place in grid), *own], where=where)

    hidden = _side(tensors[naming.block_name(0, 0, "weight")], -1)
    vocab = _side(tensors[own[0]], 0) if own else 0
    shapes = {naming.block_name(*place): [hidden] * (2 if place[2] == "weight" else 1) for place in grid}
    _check_shapes(tensors, shapes | {name: [vocab, hidden] for name in own}, where)

    def all_of(part: str) -> list[list[Tensor]]:
        return [[tensors[naming.block_name(k, n, part)] for n in range(num_layers)] for k in range(num_heads)]

    weights = all_of("weight")
    return HeadTensors(
        weights=weights,
        biases=all_of("bias") if with_bias else [[w.new_zeros(hidden) for w in head] for head in weights],
        lm_heads=[tensors[name] for name in own] or None,
    )


def belongs(name: str, naming: Naming) -> bool:
    """Is this the name of a block or an lm_head in the layout?"""
    return bool(_numbered(naming.block, [name]) or _numbered(naming.lm_head, [name]))


def _numbered(template: str, names: Iterable[str]) -> list[dict[str, str]]:
    """The fields of the template in each name that fits it."""
    pattern = re.escape(template)
    for field, values in (("head", r"\d{1,9}"), ("layer", r"\d{1,9}"), ("part", "weight|bias")):
        pattern = pattern.replace(re.escape(f"{{{field}}}"), f"(?P<{field}>{values})")
    return [match.groupdict() for match in map(re.compile(pattern).fullmatch, names) if match]


def _side(tensor: Tensor, dim: int) -> int:
    return tensor.shape[dim] if tensor.dim() else 0


def _check_names(tensors: Mapping[str, Tensor], *, expected: Sequence[str], where: object) -> None:
    missing = [name for name in expected if name not in tensors]
    unexpected = sorted(tensors.keys() - set(expected))
    told = [
        f"{kind}: {', '.join(names)}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names
    ]
    if told:
        raise CheckpointError(f"{where} does not hold a whole set of heads; {'; '.join(told)}")


def _check_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]], where: object) -> None:
    wrong = [
        f"{name} {list(tensors[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if list(tensors[name].shape) != shape
    ]
    if wrong:
        raise CheckpointError(f"{where} does not hold a whole set of heads; mis-shaped: {', '.join(wrong)}")
    broken = [name for name in shapes if not tensors[name].isfinite().all()]
    if broken:
        raise CheckpointError(f"{where} holds NaN or infinite values in {', '.join(broken)}")
