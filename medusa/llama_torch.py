"""What a Llama layer does between its products, by PyTorch's own kernels. Knows layouts; knows no weights of products.

    B sequences, N new positions, D hidden, H key/value heads, G query heads per key/value head, E head size, I gated width

`llama_triton` has the same functions, each of them one kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medusa.kv_cache import KVCache


@dataclass(frozen=True, kw_only=True)
class HeadEdits:
    """What some families do to heads before they turn: Qwen 2 adds `bias` [(GH+2H)·E], Qwen 3 takes the RMS norm of each
    query and key head, with gains [2,E] of queries and of keys."""

    bias: Tensor | None = None
    gains: Tensor | None = None
    eps: float = 0.0


def norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of hidden [...,D]."""
    return F.rms_norm(hidden, weight.shape, weight, eps)


def add_norm(hidden: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """hidden [...,D] and what a block adds to it → their sum, and the RMS norm of that, which the next block reads."""
    hidden = hidden + update
    return hidden, norm(hidden, weight, eps)


def gated(gate_up: Tensor) -> Tensor:
    """gate and up side by side [...,2I] → SiLU(gate) · up [...,I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate_into(
    cache: KVCache,
    layer: int,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    groups: int,
    edits: HeadEdits,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B,N,(GH+2H)·E] and the rotary tables [B,N,E] → rotated query [B,H,G·N,E], and the layer's keys and values
    [B,H,length,E] with the new ones written behind the rows' offsets."""
    batch, num_new, size = cos.shape
    num_kv = qkv.shape[-1] // size // (groups + 2)
    if edits.bias is not None:
        qkv = qkv + edits.bias
    parts = qkv.view(batch, num_new, -1, size).transpose(1, 2)
    straight, value = parts.split((num_kv * (groups + 1), num_kv), dim=1)
    if edits.gains is not None:
        both = straight.split((num_kv * groups, num_kv), dim=1)
        straight = torch.cat([norm(x, gain, edits.eps) for x, gain in zip(both, edits.gains, strict=True)], dim=1)
    turned = _rotate(straight, cos.unsqueeze(1), sin.unsqueeze(1))
    query, key = turned.split((num_kv * groups, num_kv), dim=1)
    keys, values = cache.update(key, value, layer)
    return query.reshape(batch, num_kv, groups * num_new, size), keys, values


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [B,H,N,E]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return torch.addcmul(x * cos, turned, sin)
