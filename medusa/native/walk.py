"""Which path of a verified tree is accepted, all schemes. Knows tensors and addresses.

B sequences, N nodes, V vocabulary
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa.native.build import library
from medusa.native.linear import kernels

if TYPE_CHECKING:
    from medusa.sampling import SamplingRows

COLUMNS = "scheme", "top_k", "seed", "choice", "sample_root", "max_nodes", "temperature", "top_p", "epsilon", "delta"


class CRows(ctypes.Structure):
    """`Rows` of acceptance.h: columns [B] of SamplingRows."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in COLUMNS)


def can_walk(logits: Tensor) -> bool:
    """Do the kernels read these logits?"""
    known = logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.bfloat16)
    return known and logits.is_contiguous() and library() is not None


def accepted_path(
    logits: Tensor, tokens: Tensor, parents: Tensor, rows: SamplingRows, root_position: Tensor
) -> tuple[Tensor, Tensor]:
    """logits [B,N,V], tokens and parents [B,N], the root's position [B] → the last accepted node [B] and the next root [B].

    `acceptance.accept` by one call: only nodes that are reached are looked at, and noise is made only for tokens that can win;
    PyTorch takes a dozen operations for each depth, and filters by sorting the vocabulary. For eager steps: what records
    operations does not see it.
    """
    batch, nodes, vocab_size = logits.shape
    if tokens.stride(1) != 1 or parents.stride(1) != 1:
        tokens, parents = tokens.contiguous(), parents.contiguous()
    columns = [getattr(rows, name).contiguous() for name in COLUMNS]
    positions = root_position.contiguous()
    threads = min(torch.get_num_threads(), batch)
    work = torch.empty(
        threads * kernels().medusa_accept_bytes(*map(ctypes.c_int64, (nodes, vocab_size))), dtype=torch.uint8
    )
    last, next_root = torch.empty(2, batch, dtype=torch.int64)
    kernels().medusa_accept(
        ctypes.byref(CRows(*(column.data_ptr() for column in columns))),
        ctypes.c_void_p(logits.data_ptr()),
        ctypes.c_int64(logits.dtype == torch.bfloat16),
        ctypes.c_int64(batch),
        ctypes.c_int64(nodes),
        ctypes.c_int64(vocab_size),
        ctypes.c_void_p(tokens.data_ptr()),
        ctypes.c_int64(tokens.stride(0)),
        ctypes.c_void_p(parents.data_ptr()),
        ctypes.c_int64(parents.stride(0)),
        ctypes.c_void_p(positions.data_ptr()),
        ctypes.c_void_p(last.data_ptr()),
        ctypes.c_void_p(next_root.data_ptr()),
        ctypes.c_void_p(work.data_ptr()),
        ctypes.c_int64(threads),
    )
    return last, next_root
