"""What a Llama layer does between its products, each step of it one Triton kernel: see `llama_torch`, which is the same.

    B sequences, N new positions, D hidden, H key/value heads, G query heads per key/value head, E head size, I gated width

A decode step has few rows, so its many small operations cost their launches. Sums and products are float32 and rounded
once, where PyTorch's operations round each by itself. Import this where Triton is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from medusa.kv_cache import KVCache
from medusa.llama_torch import HeadEdits

WIDTH = 1024  # elements of a program of `gated`
HEADS = 4  # heads of a program of `rotate_into`


@triton.jit
def _norm(hidden, update, weight, summed, normed, eps, size, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One row: its sum with the update where there is one, stored, and the norm of that."""
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < size
    x = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        # Rounded as it is stored: what the next block adds to is what this one read.
        x = (x + tl.load(update + place, mask=inside, other=0.0).to(tl.float32)).to(summed.dtype.element_ty)
        tl.store(summed + place, x, mask=inside)
        x = x.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(x * x, axis=0) / size + eps)
    gain = tl.load(weight + tl.arange(0, BLOCK), mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + place, (x * scale * gain).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _gate(gate_up, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(gate_up + row * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
    gated = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row * size + column, gated.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(qkv, bias, gains, cos, sin, offsets, query, keys, values, num_new, num_kv, groups, half, stride_slot,
            stride_head, eps, BIAS: tl.constexpr, NORM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """Some heads of one new position: query heads to the query, key heads to the cache, both turned, and with NORM normed
    before; value heads as they are. `keys` and `values` begin at the first row's slot."""
    token = tl.program_id(0).to(tl.int64)
    sequence, new = token // num_new, token % num_new
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    within = tl.arange(0, HALF)
    num_query = num_kv * groups
    size = 2 * half
    inside = (head < num_query + 2 * num_kv)[:, None] & (within < half)[None, :]
    source = qkv + (token * (num_query + 2 * num_kv) + head)[:, None] * size + within[None, :]
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        added = bias + head[:, None] * size + within[None, :]
        low += tl.load(added, mask=inside, other=0.0).to(tl.float32)
        high += tl.load(added + half, mask=inside, other=0.0).to(tl.float32)
    is_query = inside & (head < num_query)[:, None]
    plain_low, plain_high = low, high
    if NORM:
        scale = 1 / tl.sqrt(tl.sum(low * low + high * high, axis=1) / size + eps)
        gain = gains + tl.where(head < num_query, 0, size)[:, None] + within[None, :]
        low *= scale[:, None] * tl.load(gain, mask=inside, other=0.0).to(tl.float32)
        high *= scale[:, None] * tl.load(gain + half, mask=inside, other=0.0).to(tl.float32)
    turn = token * size + within
    c = tl.load(cos + turn, mask=within < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + turn, mask=within < half, other=0.0).to(tl.float32)[None, :]
    turned_low = (low * c - high * s).to(query.dtype.element_ty)
    turned_high = (high * c + low * s).to(query.dtype.element_ty)

    row = (sequence * num_query + head) * num_new + new  # [B,H,G·N,E]: query head by query head, the nodes of each
    target = query + row[:, None] * size + within[None, :]
    tl.store(target, turned_low, mask=is_query)
    tl.store(target + half, turned_high, mask=is_query)

    slot = sequence * stride_slot + (tl.load(offsets + sequence) + new) * size
    key_head = head - num_query
    is_key = inside & ((key_head >= 0) & (key_head < num_kv))[:, None]
    target = keys + slot + key_head[:, None] * stride_head + within[None, :]
    tl.store(target, turned_low, mask=is_key)
    tl.store(target + half, turned_high, mask=is_key)

    value_head = key_head - num_kv
    is_value = inside & (value_head >= 0)[:, None]
    target = values + slot + value_head[:, None] * stride_head + within[None, :]
    tl.store(target, plain_low.to(values.dtype.element_ty), mask=is_value)
    tl.store(target + half, plain_high.to(values.dtype.element_ty), mask=is_value)


def norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `llama_torch.norm`."""
    hidden = hidden.contiguous()
    return _normed(hidden, None, hidden, weight, eps)


def add_norm(hidden: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `llama_torch.add_norm`."""
    hidden = hidden.contiguous()
    summed = torch.empty_like(hidden)
    return summed, _normed(hidden, update.contiguous(), summed, weight, eps)


def _normed(hidden: Tensor, update: Tensor | None, summed: Tensor, weight: Tensor, eps: float) -> Tensor:
    normed, size = torch.empty_like(hidden), hidden.shape[-1]
    block = triton.next_power_of_2(size)
    _norm[(hidden.numel() // size,)](
        hidden, hidden if update is None else update, weight, summed, normed, eps, size, ADD=update is not None,
        BLOCK=block, num_warps=min(16, max(1, block // 256)),
    )  # fmt: skip
    return normed


def gated(gate_up: Tensor) -> Tensor:
    """As `llama_torch.gated`."""
    gate_up, size = gate_up.contiguous(), gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], size, dtype=gate_up.dtype, device=gate_up.device)
    _gate[(out.numel() // size, triton.cdiv(size, WIDTH))](gate_up, out, size, BLOCK=WIDTH)
    return out


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
    """As `llama_torch.rotate_into`."""
    batch, num_new, size = cos.shape
    num_kv = qkv.shape[-1] // size // (groups + 2)
    keys, values = cache.seen(layer)
    assert keys.stride() == values.stride() and keys.stride()[2:] == (size, 1)
    query = torch.empty(batch, num_kv, groups * num_new, size, dtype=qkv.dtype, device=qkv.device)
    half = size // 2
    _rotate[(batch * num_new, triton.cdiv(num_kv * (groups + 2), HEADS))](
        qkv.contiguous(), cos if edits.bias is None else edits.bias, cos if edits.gains is None else edits.gains,
        cos.contiguous(), sin.contiguous(), cache.offsets, query, keys, values, num_new, num_kv, groups, half,
        keys.stride(0), keys.stride(1), edits.eps, BIAS=edits.bias is not None, NORM=edits.gains is not None, HEADS=HEADS,
        HALF=triton.next_power_of_2(half), num_warps=1,
    )  # fmt: skip
    return query, keys, values
