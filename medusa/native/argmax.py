"""The largest of each row. Knows tensors and addresses."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from medusa.native.build import library
from medusa.native.linear import kernels


def largest_at(x: Tensor, which: Tensor) -> Tensor:
    """x [R,V] and rows of it [B] → where the largest of each first stands [B]: `x[which].argmax(dim=-1)`, NaN included.

    PyTorch copies the rows and then looks at one number at a time; where the kernels can, they do neither.
    """
    on_cpu = x.device.type == "cpu"
    if not on_cpu or x.dtype != torch.float32 or not x.is_contiguous() or library() is None:
        chosen = x[which]
        # Exact, and a quarter of the time: its argmax over bfloat16 is not vectorised there.
        return (chosen.float() if on_cpu and x.dtype == torch.bfloat16 else chosen).argmax(dim=-1)
    which = which.contiguous()
    places = torch.empty_like(which)
    kernels().medusa_argmax(
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int64(x.shape[1]),
        ctypes.c_void_p(which.data_ptr()),
        ctypes.c_int64(len(which)),
        ctypes.c_void_p(places.data_ptr()),
        ctypes.c_int64(torch.get_num_threads()),
    )
    return places
