"""A static tree filled by hydra heads in few kernels: see `hydra.sequential_candidates`, which is the same. Knows tokens.

    B sequences, N tree nodes, F nodes of a level that are gone on from, M = B·F rows, J tokens of a path that a head reads,
    D hidden, V vocabulary

At batch 1 a level costs its launches. Here it is what the head reads as one kernel, a product and one more for each
residual block, the lm_head's product, and two that rank and write the children. The products are the library's. Only shapes
decide what is launched: a graph can record it once the kernels are compiled. Import this where Triton is.
"""

from __future__ import annotations

from itertools import chain

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from medusa import hydra
from medusa.heads import LmHead, MedusaHeads
from medusa.ranks_triton import fill_children
from medusa.tree import DeviceTree

WIDTH = 1024  # elements of a program of `add_silu`
EPS = torch.finfo(torch.float32).eps  # what F.rms_norm adds where it is told nothing, in 16 bits too
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _gather(hidden, tokens, paths, embeddings, out, num_inner, num_nodes, path_length, size, eps, BLOCK: tl.constexpr):
    """One of the 1+J vectors of one row: the hidden state, or a token's embedding at unit mean square."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequence, inner = row // num_inner, row % num_inner
    place = tl.arange(0, BLOCK)
    inside = place < size
    target = out + (row * tl.num_programs(1) + part) * size + place
    if part == 0:
        tl.store(target, tl.load(hidden + sequence * size + place, mask=inside), mask=inside)
    else:
        node = tl.load(paths + inner * path_length + part - 1)
        token = tl.load(tokens + sequence * num_nodes + node)
        x = tl.load(embeddings + token * size + place, mask=inside, other=0.0).to(tl.float32)
        normed = x * (1 / tl.sqrt(tl.sum(x * x, axis=0) / size + eps))
        # By way of the embeddings' type, which is that of the norm.
        tl.store(target, normed.to(embeddings.dtype.element_ty).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_silu(hidden, update, out, stride, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    x = tl.load(hidden + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(update + row * size + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, (x + u / (1 + tl.exp(-u))).to(out.dtype.element_ty), mask=inside)


def sequential_candidates(
    heads: MedusaHeads, tree: DeviceTree, root: Tensor, hidden: Tensor, lm_head: LmHead, *, embeddings: Tensor
) -> Tensor:
    """As `hydra.sequential_candidates`, which serves types and layouts that the kernels are not made for.

    `embeddings` [V,D] are what `lm_head.embed` looks up.
    """
    if not _fits(heads, hidden, embeddings):
        return hydra.sequential_candidates(heads, tree, root, hidden, lm_head)
    tokens = root[:, None].repeat(1, tree.num_nodes)
    for head, level in enumerate(tree.levels):
        read = path_inputs(tokens, level.paths, hidden, embeddings, num_read=heads.heads[head].num_read)  # type: ignore[arg-type]
        features = read[:, : hidden.shape[1]]
        for block in heads.heads[head].blocks:  # type: ignore[union-attr]
            features = add_silu(features, F.linear(read, block.weight, block.bias))
            read = features
        logits = heads.read(head, features.view(len(root), len(level.paths), -1), lm_head)
        fill_children(tokens, level, logits, heads.vocabulary)
    return tokens


def path_inputs(tokens: Tensor, paths: Tensor, hidden: Tensor, embeddings: Tensor, *, num_read: int) -> Tensor:
    """What a head reads at each inner node [M,(1+J)·D]: hidden [B,D], then embeddings of the path's first J = `num_read` tokens.

    tokens [B,N], paths [F,≥ J] of nodes, embeddings [V,D]; the arithmetic is that of `MedusaHeads.path_embeddings`.
    """
    (num_inner, path_length), (batch, size) = paths.shape, hidden.shape
    assert tokens.is_contiguous() and embeddings.is_contiguous() and num_read <= path_length
    out = torch.empty(batch * num_inner, (1 + num_read) * size, dtype=hidden.dtype, device=hidden.device)
    block = triton.next_power_of_2(size)
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        _gather[(len(out), 1 + num_read)](
            hidden.contiguous(), tokens, paths.contiguous(), embeddings, out, num_inner, tokens.shape[1], path_length, size,
            EPS, BLOCK=block, num_warps=min(16, max(1, block // 256)),
        )  # fmt: skip
    return out


def add_silu(hidden: Tensor, update: Tensor) -> Tensor:
    """hidden [M,D] + SiLU(update [M,D]), rounded once. Rows of `hidden` may lie apart."""
    (rows, size), update = update.shape, update.contiguous()
    out = torch.empty_like(update)
    with torch.cuda.device_of(update):  # Triton launches on the current device
        _add_silu[(rows, triton.cdiv(size, WIDTH))](hidden, update, out, hidden.stride(0), size, BLOCK=WIDTH)
    return out


def _fits(heads: MedusaHeads, hidden: Tensor, embeddings: Tensor) -> bool:
    """Are the kernels made for these types, for such embeddings, and for weights that lie as they were learned?"""
    blocks = list(chain(*(head.blocks for head in heads.heads)))  # type: ignore[arg-type]
    known = hidden.dtype in DTYPES and embeddings.dtype in DTYPES and embeddings.is_contiguous()
    return known and all(block.packed is None and block.weight.dtype == hidden.dtype for block in blocks)
