"""A weight laid out for the kernels and its product. Knows tensors and addresses; knows no layers.

O outputs, I inputs
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medusa.native.build import library

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class CWeight(ctypes.Structure):
    """`Weight` of kernels.c."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("type", ctypes.c_int64),
    )


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight [O,I] as kernels.c reads it; call it for x·weightᵀ, float32 in and out.

    `panels` [O/2L,I/S,L,S,2]: L lanes of a vector, S inputs whose weights share a word (two of int8).
    """

    panels: Tensor
    scales: Tensor | None
    outputs: int
    inputs: int

    @classmethod
    def of(cls, weight: Tensor, *, int8: bool = False) -> PackedWeight:
        """weight [O,I] in float32 or bfloat16; `int8` rounds each output's weights to 255 steps (I must be even)."""
        outputs, inputs = weight.shape
        shared = 2 if int8 else 1
        if inputs % shared:
            raise ValueError(f"a weight in int8 must have an even number of inputs, got {inputs}")
        lanes = kernels().medusa_lanes()
        weight = F.pad(weight.detach(), (0, 0, 0, -outputs % (2 * lanes)))
        scales = None
        if int8:
            scales = weight.float().abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
            weight = (weight.float() / scales[:, None]).round().to(torch.int8)
        panels = weight.view(-1, 2, lanes, inputs // shared, shared).permute(0, 3, 2, 4, 1)
        if weight.dtype == torch.float32:  # one weight fills a word, so the halves lie one behind the other
            panels = panels.transpose(2, 4)
        return cls(panels=panels.contiguous(), scales=scales, outputs=outputs, inputs=inputs)

    def c(self) -> CWeight:
        """What the kernels read; valid while this object lives."""
        return CWeight(
            panels=self.panels.data_ptr(),
            scales=None if self.scales is None else self.scales.data_ptr(),
            outputs=self.outputs,
            inputs=self.inputs,
            type=TYPES[self.panels.dtype],
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x [...,I] → [...,O]."""
        flat = x.reshape(-1, self.inputs).contiguous()
        assert flat.dtype == torch.float32
        out = torch.empty(flat.shape[0], self.outputs)
        kernels().medusa_linear(
            ctypes.byref(self.c()),
            ctypes.c_void_p(flat.data_ptr()),
            ctypes.c_int64(flat.shape[0]),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_int64(torch.get_num_threads()),
        )
        return out.view(*x.shape[:-1], self.outputs)


def kernels() -> ctypes.CDLL:
    """The library; RuntimeError where there is none."""
    found = library()
    if found is None:
        raise RuntimeError("there are no CPU kernels here: a C compiler makes them (medusa/native/build.py)")
    return found
