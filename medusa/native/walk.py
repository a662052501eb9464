"""The greedy walk down verified trees. Knows tensors and addresses.

B sequences, N nodes, V vocabulary
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from medusa.native.build import library
from medusa.native.linear import kernels


def can_walk(logits: Tensor) -> bool:
    """Do the kernels read these logits?"""
    on_cpu = logits.device.type == "cpu"
    return on_cpu and logits.dtype == torch.float32 and logits.is_contiguous() and library() is not None


def greedy_walk(logits: Tensor, tokens: Tensor, parents: Tensor, max_nodes: Tensor | None) -> tuple[Tensor, Tensor]:
    """logits [B,N,V], tokens and parents [B,N] → the last accepted node [B] and the token chosen there [B].

    Of each row the first `max_nodes` [B] may be accepted. One look at each row walked over, where PyTorch takes a dozen
    operations for each depth. For eager steps: what records operations does not see it.
    """
    batch, nodes, vocab_size = logits.shape
    if tokens.stride(1) != 1 or parents.stride(1) != 1:
        tokens, parents = tokens.contiguous(), parents.contiguous()
    limits = None if max_nodes is None else max_nodes.contiguous()
    last, choice = torch.empty(2, batch, dtype=torch.int64)
    kernels().medusa_walk(
        ctypes.c_void_p(logits.data_ptr()),
        ctypes.c_int64(batch),
        ctypes.c_int64(nodes),
        ctypes.c_int64(vocab_size),
        ctypes.c_void_p(tokens.data_ptr()),
        ctypes.c_int64(tokens.stride(0)),
        ctypes.c_void_p(parents.data_ptr()),
        ctypes.c_int64(parents.stride(0)),
        ctypes.c_void_p(None if limits is None else limits.data_ptr()),
        ctypes.c_void_p(last.data_ptr()),
        ctypes.c_void_p(choice.data_ptr()),
        ctypes.c_int64(torch.get_num_threads()),
    )
    return last, choice
