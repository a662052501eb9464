"""Low-rank adapters without peft: what MEDUSA-2 tunes here, and its form in `medusa.adapters`. Knows modules alone.

r rank; y = W x + alpha / r · B A dropout(x)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medusa.adapters import Adapters


class LowRank(nn.Module):
    """A frozen linear layer with an adapter beside it, which starts at zero and may be switched off."""

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base, self.scale, self.dropout, self.on = base, alpha / rank, dropout, True
        device = base.weight.device
        self.down = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.on:
            return y
        dropped = F.dropout(x, self.dropout, training=self.dropout > 0 and torch.is_grad_enabled())
        beside = F.linear(F.linear(dropped, self.down.to(x.dtype)), self.up.to(x.dtype))
        return y + self.scale * beside


def adapt(model: nn.Module, *, rank: int, alpha: float, dropout: float) -> dict[str, LowRank]:
    """Put an adapter beside every linear layer but the lm_head, in place; by the layers' names."""
    lm_head = model.get_output_embeddings()  # type: ignore[operator]
    linear = {n: layer for n, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not lm_head}
    made = {}
    for name, layer in linear.items():
        made[name] = LowRank(layer, rank=rank, alpha=alpha, dropout=dropout)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made[name])
    return made


@contextlib.contextmanager
def switched_off(layers: Mapping[str, LowRank]) -> Iterator[None]:
    """The original backbone for the time of the block."""
    for layer in layers.values():
        layer.on = False
    try:
        yield
    finally:
        for layer in layers.values():
            layer.on = True


def exported(layers: Mapping[str, LowRank], *, rank: int, alpha: float) -> Adapters:
    """The adapters under the names of the original model."""
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_A.weight"] = layer.down.detach()
        tensors[f"{name}.lora_B.weight"] = layer.up.detach()
    return Adapters(kind="lora", tensors=tensors, rank=rank, alpha=alpha)
