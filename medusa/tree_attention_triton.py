"""Attention over "prefix + tree" as a Triton kernel: no mask of the context, keys split over processors. Knows tensors alone.

    B sequences, H key/value heads, M query rows of each (query head by query head, N nodes each), N nodes, E head size,
    S key slots, C pieces that the keys are cut into

Every node sees the whole prefix, so a mask is read only for the tree, the last N keys. Each program takes one piece of
the keys ("split-K", as flash-decoding does it) and keeps a running softmax in float32; a second kernel joins the
pieces. How long each prefix is stands in a device tensor: a replayed graph serves any length up to S. Slots behind a
row's tree are never read. Import this where Triton is; elsewhere, `F.scaled_dot_product_attention` with a mask serves.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # keys of a block, and most query rows
# A processor's shared memory, 99 KB on many GPUs, holds no larger ones of float32; by head size up to 128 and above.
FLOAT32_BLOCKS = (32, 16)
MAX_PIECES = 64
PROGRAMS_PER_PROCESSOR = 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _attend_block(query, k, v, places, is_key, sees, most, total, seen, scale, stride_k, stride_v, size,
                  HEAD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Take one block of keys into the running softmax: its largest score, its sum, and the weighted values."""
    within = tl.arange(0, HEAD)
    inside = is_key[:, None] & (within < size)[None, :]
    keys = tl.load(k + places[:, None] * stride_k + within[None, :], mask=inside, other=0.0)
    values = tl.load(v + places[:, None] * stride_v + within[None, :], mask=inside, other=0.0)
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
    scores = tl.where(sees, scores, float("-inf"))
    higher = tl.maximum(most, tl.max(scores, axis=1))
    # Before a row has seen anything its largest score is −inf, and −inf − −inf would be NaN.
    anchor = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp(scores - anchor[:, None])
    shrink = tl.exp(most - anchor)
    total = total * shrink + tl.sum(weights, axis=1)
    seen = seen * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    return higher, total, seen


@triton.jit
def _by_node(row, num_heads, num_rows, num_nodes):
    """Where a row of [B,H,G,N] lies in [B,N,H,G]."""
    node, head = row % num_nodes, row // num_nodes
    of_sequence = num_heads * (num_rows // num_nodes)
    return (head // of_sequence * num_nodes + node) * of_sequence + head % of_sequence


@triton.jit
def _pieces(q, k, v, offsets, visible, partial, most_of, total_of, scale, num_heads, num_rows, num_nodes, size,
            stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_k, stride_vb, stride_vh, stride_v,
            stride_seen_b, stride_seen_n, out, depths, stride_depth_b, window,
            ROWS: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr, PRECISION: tl.constexpr,
            WHOLE: tl.constexpr, WINDOW: tl.constexpr):  # fmt: skip
    """Softmax over one piece of one row's keys: partial [B,H,M,C,E] not yet divided, its largest score and its sum; or,
    where one piece is the `WHOLE`, the result."""
    sequence = (tl.program_id(0) // num_heads).to(tl.int64)
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    piece, num_pieces = tl.program_id(2), tl.num_programs(2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    node = row % num_nodes
    within = tl.arange(0, HEAD)
    is_row = row < num_rows
    query = tl.load(q + sequence * stride_qb + head * stride_qh + row[:, None] * stride_qm + within[None, :],
                    mask=is_row[:, None] & (within < size)[None, :], other=0.0)  # fmt: skip
    k += sequence * stride_kb + head * stride_kh
    v += sequence * stride_vb + head * stride_vh

    prefix = tl.load(offsets + sequence).to(tl.int32)
    end = prefix + num_nodes
    begin = 0
    if WINDOW:  # the root's begins first
        begin = tl.maximum(prefix - window + 1, 0) // KEYS * KEYS
        before = prefix + tl.load(depths + sequence * stride_depth_b + node).to(tl.int32) - window
    width = tl.cdiv(tl.cdiv(end - begin, num_pieces), KEYS) * KEYS
    first = begin + piece * width
    last = tl.minimum(first + width, end)
    # Blocks that lie in the prefix as a whole are seen by everyone but for a window; the others may hold nodes of the tree.
    unmasked = tl.minimum(tl.maximum(prefix // KEYS * KEYS, first), tl.maximum(last, first))

    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    seen = tl.zeros([ROWS, HEAD], tl.float32)
    for start in range(first, unmasked, KEYS):
        places = start + tl.arange(0, KEYS)
        is_key = places < prefix
        sees = is_key[None, :]
        if WINDOW:
            sees = sees & (places[None, :] > before[:, None])
        most, total, seen = _attend_block(query, k, v, places, is_key, sees, most, total, seen,
                                          scale, stride_k, stride_v, size, HEAD, PRECISION)  # fmt: skip
    for start in range(unmasked, last, KEYS):
        places = start + tl.arange(0, KEYS)
        is_key = places < last
        other = places - prefix
        is_node = is_key & (other >= 0)
        pair = visible + sequence * stride_seen_b + node[:, None] * stride_seen_n + other[None, :]
        sees = tl.load(pair, mask=is_node[None, :] & is_row[:, None], other=0) != 0
        in_prefix = (is_key & (other < 0))[None, :]
        if WINDOW:
            in_prefix = in_prefix & (places[None, :] > before[:, None])
        sees = sees | in_prefix
        most, total, seen = _attend_block(query, k, v, places, is_key, sees, most, total, seen,
                                          scale, stride_k, stride_v, size, HEAD, PRECISION)  # fmt: skip
    if WHOLE:
        target = _by_node(tl.program_id(0).to(tl.int64) * num_rows + row, num_heads, num_rows, num_nodes)
        joined = seen / total[:, None]
        tl.store(out + target[:, None] * size + within[None, :], joined.to(out.dtype.element_ty),
                 mask=is_row[:, None] & (within < size)[None, :])  # fmt: skip
    else:
        place = (tl.program_id(0).to(tl.int64) * num_rows + row) * num_pieces + piece
        tl.store(partial + place[:, None] * size + within[None, :], seen,
                 mask=is_row[:, None] & (within < size)[None, :])  # fmt: skip
        tl.store(most_of + place, most, mask=is_row)
        tl.store(total_of + place, total, mask=is_row)


@triton.jit
def _join(partial, most_of, total_of, out, num_heads, num_rows, num_nodes, num_pieces, size,
          PIECES: tl.constexpr, HEAD: tl.constexpr):  # fmt: skip
    """One query row: its pieces [C,E] weighed by their largest scores, and divided by the sum of all."""
    row = tl.program_id(0).to(tl.int64)
    piece, within = tl.arange(0, PIECES), tl.arange(0, HEAD)
    is_piece = piece < num_pieces
    place = row * num_pieces + piece
    most = tl.load(most_of + place, mask=is_piece, other=float("-inf"))
    weights = tl.exp(most - tl.max(most, axis=0))
    total = tl.sum(weights * tl.load(total_of + place, mask=is_piece, other=0.0), axis=0)
    inside = is_piece[:, None] & (within < size)[None, :]
    seen = tl.load(partial + place[:, None] * size + within[None, :], mask=inside, other=0.0)
    joined = tl.sum(weights[:, None] * seen, axis=0) / total
    target = _by_node(row, num_heads, num_rows, num_nodes)
    tl.store(out + target * size + within, joined.to(out.dtype.element_ty), mask=within < size)


def tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    visible: Tensor,
    *,
    depths: Tensor,
    window: int | None = None,
    scale: float | None = None,
    num_pieces: int | None = None,
) -> Tensor:
    """query [B,H,M,E], keys and values [B,H,S,E], prefix lengths `offsets` [B] (integers, offsets + N ≤ S) → [B,N,HM/N,E]:
    each node's query heads side by side, as the product that follows reads them.

    `visible` [B,N,N] bool says which nodes, the keys right behind a prefix, see which; query row m is node m mod N. The
    last dimension of keys, values and `visible` lies in one piece. With a `window` a node sees only what lies less than that
    many positions back, by the nodes' `depths` [B,N] below the root, which is node 0; among the nodes `visible` must say so
    already. `scale` is 1/√E by default, `num_pieces` fits the GPU.
    """
    batch, num_heads, num_rows, size = query.shape
    num_nodes = visible.shape[-1]
    if query.dtype not in DTYPES:
        raise ValueError(
            f"Triton attention computes in float32, bfloat16 or float16, got {query.dtype}; use gpu_kernels='torch'"
        )
    assert num_rows % num_nodes == 0 and visible.dtype == torch.bool
    assert keys.stride(3) == values.stride(3) == visible.stride(2) == depths.stride(1) == 1, (
        "read along the last dimension"
    )
    query = query.contiguous()
    exact = query.dtype == torch.float32
    head = max(16, triton.next_power_of_2(size))
    block = FLOAT32_BLOCKS[head > 128] if exact else BLOCK
    block_rows = min(block, max(16, triton.next_power_of_2(num_rows)))
    row_blocks = triton.cdiv(num_rows, block_rows)
    pieces = num_pieces or _num_pieces(batch * num_heads * row_blocks, triton.cdiv(keys.shape[2], block), query.device)
    whole = pieces == 1
    partial, most, total = (
        torch.empty(
            0 if whole else batch * num_heads * num_rows * pieces * width, dtype=torch.float32, device=query.device
        )
        for width in (size, 1, 1)
    )
    out = torch.empty(
        batch, num_nodes, num_heads * (num_rows // num_nodes), size, dtype=query.dtype, device=query.device
    )
    seen = visible.view(torch.uint8)
    _pieces[(batch * num_heads, row_blocks, pieces)](
        query, keys, values, offsets, seen, partial, most, total, scale or size**-0.5,
        num_heads, num_rows, num_nodes, size, *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        *seen.stride()[:2], out, depths, depths.stride(0), window or 0, ROWS=block_rows, KEYS=block, HEAD=head,
        PRECISION="ieee" if exact else "tf32", WHOLE=whole, WINDOW=window is not None,
    )  # fmt: skip
    if not whole:
        _join[(batch * num_heads * num_rows,)](
            partial, most, total, out, num_heads, num_rows, num_nodes, pieces, size,
            PIECES=triton.next_power_of_2(pieces), HEAD=head,
        )  # fmt: skip
    return out


def _num_pieces(programs: int, key_blocks: int, device: torch.device) -> int:
    """Enough programs for every processor, by what is known when a graph is recorded: shapes alone."""
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * _num_processors(device), programs)
    return max(1, min(wanted, key_blocks, MAX_PIECES))


@cache
def _num_processors(device: torch.device) -> int:
    """A GPU's multiprocessors; 1 elsewhere, where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
