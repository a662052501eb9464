"""Attention over "prefix + tree" inside unforked transformers models. Knows masks and shapes; knows no tokens.

    B sequences, N new positions, S cache positions, H query heads, G query heads per key/value head, E head size

A node sees the whole accepted prefix, its ancestors and itself. In a sliding-window layer it sees, of these, only what
lies less than `window` *positions* (not slots) back: siblings share a position but not a slot.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from medusa.errors import BackboneError
from medusa.triton_support import has_triton

IMPLEMENTATION = "medusa_tree"
GpuKernels = Literal["torch", "triton", "fused"]
MAX_TRITON_NODES = 256  # longer chunks of prompts are few: the masked kernel reads them
# Query with its groups folded into its rows [B,H/G,G·N,E], keys and values [B,H/G,S,E] → node by node [B,N,H,E].
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def layer_windows(config: Any) -> dict[str, int | None]:
    """Attention kind → sliding window in positions (None: full), for the kinds that a model's layers have."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and config.model_type != "mistral":  # whose layers all slide where there is a window, whatever their types
        return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))}
    return {"sliding_attention": window} if window is not None else {"full_attention": None}


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [B,H,N,E], key and value [B,H/G,S,E], additive mask [B,1,N,S] → [B,N,H,E].

    The G query heads of a key/value head are folded into its rows, so keys and values are never repeated.
    """
    if s_aux is not None:
        raise BackboneError(f"{type(module).__name__} uses attention sinks, which tree attention does not support")
    if attention_mask is None:
        raise BackboneError(f"{type(module).__name__} passed no mask on to attention; this model cannot decode trees")
    batch, heads, num_new, size = query.shape
    groups = heads // key.shape[1]
    folded = query.reshape(batch, heads // groups, groups * num_new, size)
    mask = attention_mask.repeat(1, 1, groups, 1) if groups > 1 else attention_mask
    if softcap is None:
        out = nn.functional.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    else:
        scores = torch.tanh(folded @ key.transpose(2, 3) * scaling / softcap) * softcap + mask
        out = (
            torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
            @ value
        )
    return out.reshape(batch, heads, num_new, size).transpose(1, 2), None


def parse_gpu_kernels(name: str | None, device: torch.device, dtype: torch.dtype = torch.float32) -> GpuKernels:
    """None: "triton" where there is Triton and a GPU, but for float64, which our kernels do not compute in. ValueError for
    kernels not known, or not to be had on this device or in this type."""
    if name is None:
        return "triton" if device.type == "cuda" and dtype != torch.float64 and has_triton() else "torch"
    if name not in get_args(GpuKernels):
        raise ValueError(f"unknown gpu_kernels {name!r}; choose one of {', '.join(get_args(GpuKernels))}")
    if name != "torch" and device.type != "cuda":
        raise ValueError(f"gpu_kernels {name!r} needs a CUDA GPU, got device {device}; use 'torch'")
    if name != "torch" and dtype == torch.float64:
        raise ValueError(f"gpu_kernels {name!r} computes in float32 or less, got float64; use 'torch'")
    return name  # type: ignore[return-value]


def masked_attend(mask: Tensor, groups: int) -> Attend:
    """Attention of a step by its mask [B,1,N,S], by PyTorch's choice of kernel."""
    batch, _, num_new, _ = mask.shape
    folded = mask.repeat(1, 1, groups, 1)

    def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        seen = nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=folded)
        return seen.reshape(batch, -1, num_new, query.shape[3]).transpose(1, 2)

    return attend


def triton_attend(offsets: Tensor, depths: Tensor, visible: Tensor, window: int | None) -> Attend:
    """Attention of a step without a mask of the context: see `tree_attention_triton`. Shapes as in `step_mask`."""
    from medusa import tree_attention_triton  # Triton is where CUDA builds of torch are

    visible = within_window(depths, visible, window).expand(len(offsets), -1, -1)
    return partial(
        tree_attention_triton.tree_attention,
        offsets=offsets,
        visible=visible,
        depths=depths.expand(len(offsets), -1),
        window=window,
    )


def _given_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    return attention_mask


def register() -> None:
    """Make `tree_attention` known to transformers. The decoder's 4-D masks pass through it unchanged."""
    AttentionInterface.register(IMPLEMENTATION, tree_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _given_mask)


def step_mask(
    *,
    offsets: Tensor,
    depths: Tensor,
    visible: Tensor,
    length: int,
    dtype: torch.dtype,
    window: int | None = None,
) -> Tensor:
    """Additive mask [B,1,N,length] for N new positions behind a prefix of `offsets` [B] positions.

    `visible` [N,N] says which new positions see which, `depths` [N] how far each lies behind the prefix; each sequence may
    have its own, [B,N,N] and [B,N]. A chunk of a prompt is the chain: depths 0…N−1 and a lower triangle.
    """
    batch, num_new = len(offsets), depths.shape[-1]
    depths, visible = depths.expand(batch, -1), visible.expand(batch, -1, -1)
    slot = torch.arange(length, device=offsets.device)
    behind = slot[None, :] - offsets[:, None]
    inside = (behind >= 0) & (behind < num_new)
    node = behind.clamp(0, num_new - 1)
    below = visible.gather(2, node[:, None, :].expand(-1, num_new, -1))
    seen = (behind < 0)[:, None, :] | (inside[:, None, :] & below)
    if window is not None:
        key_depth = torch.where(inside, depths.gather(1, node), behind)
        seen = seen & (depths[:, :, None] - key_depth[:, None, :] < window)
    mask = torch.zeros(seen.shape, dtype=dtype, device=offsets.device)
    return mask.masked_fill_(~seen, float("-inf")).unsqueeze(1)


def within_window(depths: Tensor, visible: Tensor, window: int | None) -> Tensor:
    """`visible` less what lies outside a node's window among the new positions themselves."""
    if window is None or visible.shape[-1] <= window:
        return visible
    return visible & (depths[..., :, None] - depths[..., None, :] < window)


def packed_mask(documents: Tensor, *, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """documents [B,S] → additive mask [B,1,S,S]: causal, and blind to every document but one's own."""
    steps = torch.arange(documents.shape[1], device=documents.device)
    behind = steps[:, None] - steps
    seen = (documents[:, :, None] == documents[:, None, :]) & (behind >= 0)
    if window is not None:  # inside a document, slots lie as far apart as positions do
        seen = seen & (behind < window)
    return torch.zeros(seen.shape, dtype=dtype, device=documents.device).masked_fill_(~seen, float("-inf")).unsqueeze(1)


def packed_positions(documents: Tensor) -> Tensor:
    """documents [B,S] → positions [B,S] that begin at 0 with each document."""
    steps = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return steps - torch.where(begins, steps, 0).cummax(dim=1).values
