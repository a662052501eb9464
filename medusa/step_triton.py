"""How a step ends once logits are known, in four Triton kernels: the best tokens, the walk, the compaction, the new state.

    B sequences, N tree nodes, L depth, V vocabulary, C chunks that a node's logits are cut into, D hidden
    Y layers, R slots, S physical positions, H key/value heads, E head size

A small model's step is mostly launches, and PyTorch has some forty here. Each function is the same, bit for bit, as the
operations that stand beside its call. Only shapes decide what is launched. Import this where Triton is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from medusa.acceptance import Acceptance
from medusa.ranks_triton import DTYPES, NOTHING, float32_bits, ordered
from medusa.tree import RowTrees

LEAST_CHUNK = 2048  # logits of a program
MAX_CHUNKS = 32  # of a node: the walk looks at all of all nodes at once


@triton.jit
def _best_of_chunk(logits, keys, size, CHUNK: tl.constexpr):
    """One chunk of one node's logits [V] → its best, as a key: see `best_keys`. keys [B·N,C]."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = place < size
    bits = float32_bits(tl.load(logits + row * size + place, mask=inside, other=0.0))
    # To argmax every NaN is the highest value.
    value = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFFFFFF, ordered(bits))
    key = tl.where(inside, (value.to(tl.int64) << 31) - place, NOTHING)
    tl.store(keys + row * tl.num_programs(1) + tl.program_id(1), tl.max(key, axis=0))


@triton.jit
def _walk(keys, chosen, tokens, node_paths, max_nodes, last, num_accepted, next_root, path, num_nodes, num_slots, num_chunks,
          stride_tree, stride_node, stride_slot, LIMIT: tl.constexpr, NODES: tl.constexpr, SLOTS: tl.constexpr,
          CHUNKS: tl.constexpr):  # fmt: skip
    """One sequence. A node is reached when it and all above it carry what their parents choose; its path says who they are."""
    row = tl.program_id(0).to(tl.int64)
    node, slot = tl.arange(0, NODES), tl.arange(0, SLOTS)
    chosen += row * num_nodes
    tokens += row * num_nodes
    node_paths += row * stride_tree
    is_node, is_slot = node < num_nodes, slot < num_slots
    chunk = tl.arange(0, CHUNKS)
    found = keys + (row * num_nodes + node[:, None]) * num_chunks + chunk[None, :]
    best = tl.max(tl.load(found, mask=is_node[:, None] & (chunk < num_chunks)[None, :], other=NOTHING), axis=1)
    tl.store(chosen + node, -best & 0x7FFFFFFF, mask=is_node)
    tl.debug_barrier()  # each thread reads what others have stored
    place = node_paths + node[:, None] * stride_node + slot[None, :] * stride_slot
    here = tl.load(place, mask=is_node[:, None] & is_slot[None, :], other=-1)
    is_below = (here >= 0) & (slot > 0)[None, :]
    parent = tl.load(place - stride_slot, mask=is_below, other=0)
    agrees = tl.load(tokens + here, mask=is_below, other=0) == tl.load(chosen + parent, mask=is_below, other=0)
    if LIMIT:
        agrees &= here < tl.load(max_nodes + row)
    reached = tl.min((agrees | (here < 0) | (slot == 0)[None, :]).to(tl.int32), axis=1) > 0
    depth = tl.sum((here >= 0).to(tl.int32), axis=1) - 1
    # The deepest, of equals the first: depth and node make one integer. The root is always reached, so it is not negative.
    deepest = tl.max(tl.where(reached & is_node, depth * NODES + NODES - 1 - node, -1), axis=0)
    accepted = NODES - 1 - deepest % NODES
    tl.store(last + row, accepted)
    tl.store(num_accepted + row, deepest // NODES)
    tl.store(next_root + row, tl.load(chosen + accepted))
    kept = tl.load(node_paths + accepted * stride_node + slot * stride_slot, mask=is_slot)
    tl.store(path + row * num_slots + slot, kept, mask=is_slot)


@triton.jit
def _compact(store, offsets, kept, num_slots, heads, stride_plane, stride_slot, stride_head, size, SLOTS: tl.constexpr,
             SIZE: tl.constexpr):  # fmt: skip
    """One head of one sequence, keys or values of one layer. `store` begins at the first sequence's slot."""
    row = tl.program_id(1).to(tl.int64)
    plane, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    slot, within = tl.arange(0, SLOTS), tl.arange(0, SIZE)
    source = tl.load(kept + row * num_slots + slot, mask=slot < num_slots, other=-1)
    moves = ((source >= 0) & (source != slot))[:, None] & (within < size)[None, :]
    store += plane * stride_plane + row * stride_slot + head * stride_head + tl.load(offsets + row) * size
    moved = tl.load(store + source[:, None] * size + within[None, :], mask=moves)
    tl.debug_barrier()  # one warp's target may be another's source: all is read before anything is written
    tl.store(store + slot[:, None] * size + within[None, :], moved, mask=moves)


@triton.jit
def _settle(node, num_accepted, next_root, path, tokens, hidden, live, lengths, roots, last_hidden, table, num_nodes, depth,
            size, DEPTH: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    """One sequence: its row of the table, and from there on its length, root and hidden state where it is live."""
    row = tl.program_id(0).to(tl.int64)
    slot, within = tl.arange(0, DEPTH), tl.arange(0, SIZE)
    accepted, root = tl.load(num_accepted + row), tl.load(next_root + row)
    below = tl.load(path + row * (depth + 1) + 1 + slot, mask=slot < depth, other=0)
    token = tl.load(tokens + row * num_nodes + tl.maximum(below, 0), mask=slot < depth, other=0)
    table += row * (depth + 2)
    tl.store(table, accepted)
    tl.store(table + 1, root)
    tl.store(table + 2 + slot, token, mask=slot < depth)
    if row < tl.load(live):
        tl.store(lengths + row, tl.load(lengths + row) + 1 + accepted)
        tl.store(roots + row, root)
        source = hidden + (row * num_nodes + tl.load(node + row)) * size + within
        tl.store(last_hidden + row * size + within, tl.load(source, mask=within < size), mask=within < size)


def best_keys(logits: Tensor) -> Tensor:
    """logits [B,N,V] → keys [B,N,C], of which the highest is that of the argmax, `-key & 0x7FFFFFFF`: a NaN if there is one,
    and of equal logits the first."""
    if logits.dtype not in DTYPES:
        return -logits.argmax(dim=-1, keepdim=True)
    size = logits.shape[-1]
    chunk = max(LEAST_CHUNK, triton.next_power_of_2(triton.cdiv(size, MAX_CHUNKS)))
    chunks = triton.cdiv(size, chunk)
    keys = torch.empty(*logits.shape[:-1], chunks, dtype=torch.int64, device=logits.device)
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _best_of_chunk[(keys.numel() // chunks, chunks)](
            logits.contiguous(), keys, size, CHUNK=chunk, num_warps=min(16, chunk // 512)
        )
    return keys


def walk(tree: RowTrees, tokens: Tensor, logits: Tensor, max_nodes: Tensor | None) -> Acceptance:
    """tokens [B,N], logits [B,N,V] → the greedy walk, among the first max_nodes [B] nodes where given."""
    batch, num_nodes = tokens.shape
    keys, num_slots = best_keys(logits), tree.depth + 1
    nodes, slots, chunks = (triton.next_power_of_2(n) for n in (num_nodes, num_slots, keys.shape[-1]))
    node, num_accepted, next_root = torch.empty(3, batch, dtype=torch.long, device=tokens.device)
    chosen, path = (torch.empty(batch, n, dtype=torch.long, device=tokens.device) for n in (num_nodes, num_slots))
    with torch.cuda.device_of(tokens):
        _walk[(batch,)](
            keys, chosen, tokens.contiguous(), tree.node_paths, keys if max_nodes is None else max_nodes,
            node, num_accepted, next_root, path, num_nodes, num_slots, keys.shape[-1], *tree.node_paths.stride(),
            LIMIT=max_nodes is not None, NODES=nodes, SLOTS=slots, CHUNKS=chunks,
            num_warps=min(8, max(1, nodes * max(slots, chunks) // 128)),
        )  # fmt: skip
    return Acceptance(node=node, num_accepted=num_accepted, next_root=next_root, path=path)


def compact(store: Tensor, offsets: Tensor, kept: Tensor) -> None:
    """As `KVCache.compact`, in the store [Y·2,R',H,S,E] of slots that begin with the first sequence's."""
    planes, _, heads, _, size = store.shape
    batch, num_slots = kept.shape
    assert store.stride()[3:] == (size, 1)
    with torch.cuda.device_of(store):
        _compact[(planes * heads, batch)](
            store, offsets, kept.contiguous(), num_slots, heads, *store.stride()[:3], size,
            SLOTS=triton.next_power_of_2(num_slots), SIZE=triton.next_power_of_2(size), num_warps=1,
        )  # fmt: skip


def settle(
    accepted: Acceptance,
    tokens: Tensor,
    hidden: Tensor,
    live: Tensor | int,
    *,
    lengths: Tensor,
    roots: Tensor,
    last_hidden: Tensor,
) -> Tensor:
    """tokens [B,N], the nodes' hidden states [B,N,D] → the step's table [B,2+L], as the decoder's. Of the first `live` rows
    lengths, roots [R] and hidden states [R,D] become those of the accepted path, in place."""
    (batch, num_nodes), depth, size = tokens.shape, accepted.path.shape[1] - 1, hidden.shape[-1]
    table = torch.empty(batch, 2 + depth, dtype=torch.long, device=tokens.device)
    width = triton.next_power_of_2(size)
    if isinstance(live, int):
        live = torch.full((), live, device=tokens.device)
    with torch.cuda.device_of(tokens):
        _settle[(batch,)](
            accepted.node.contiguous(), accepted.num_accepted.contiguous(), accepted.next_root.contiguous(),
            accepted.path.contiguous(), tokens.contiguous(), hidden.contiguous(), live, lengths, roots, last_hidden, table,
            num_nodes, depth, size, DEPTH=triton.next_power_of_2(max(1, depth)), SIZE=width,
            num_warps=min(8, max(1, width // 256)),
        )  # fmt: skip
    return table
