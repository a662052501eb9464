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
TILES = 3  # bfloat16 for processors that multiply tiles
SIDE, DEEP = 16, 32  # outputs and inputs of a tile; a panel is two of them wide


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

    `panels` [O/2L,I/S,L,S,2]: L lanes of a vector, S inputs whose weights share a word (two of int8). Of `tiles`, which
    round x to bfloat16, [O/32,I/32,2,16,16,2]: see kernels.c.
    """

    panels: Tensor
    scales: Tensor | None
    outputs: int
    inputs: int
    tiles: bool

    @classmethod
    def of(cls, weight: Tensor, *, int8: bool = False) -> PackedWeight:
        """weight [O,I] in float32 or bfloat16; `int8` rounds each output's weights to 255 steps (I must be even)."""
        outputs, inputs = weight.shape
        if weight.dtype == torch.bfloat16 and not int8 and has_tiles():
            padded = F.pad(weight.detach(), (0, -inputs % DEEP, 0, -outputs % (2 * SIDE)))
            panels = padded.view(-1, 2, SIDE, padded.shape[1] // DEEP, DEEP // 2, 2).permute(0, 3, 1, 4, 2, 5)
            return cls(panels=panels.contiguous(), scales=None, outputs=outputs, inputs=inputs, tiles=True)
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
        return cls(panels=panels.contiguous(), scales=scales, outputs=outputs, inputs=inputs, tiles=False)

    def c(self) -> CWeight:
        """What the kernels read; valid while this object lives."""
        return CWeight(
            panels=self.panels.data_ptr(),
            scales=None if self.scales is None else self.scales.data_ptr(),
            outputs=self.outputs,
            inputs=self.inputs,
            type=TILES if self.tiles else TYPES[self.panels.dtype],
        )

    def _in_tiles(self, rows: int) -> int:
        """How many numbers the kernels round before they multiply that many rows."""
        return (rows + -rows % SIDE) * (self.inputs + -self.inputs % DEEP) if self.tiles else 0

    def __call__(self, x: Tensor) -> Tensor:
        """x [...,I] → [...,O]."""
        flat = x.reshape(-1, self.inputs).contiguous()
        assert flat.dtype == torch.float32
        rows = flat.shape[0]
        out = torch.empty(rows, self.outputs)
        narrowed = torch.empty(self._in_tiles(rows), dtype=torch.bfloat16)
        kernels().medusa_linear(
            ctypes.byref(self.c()),
            ctypes.c_void_p(flat.data_ptr()),
            ctypes.c_int64(rows),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_void_p(narrowed.data_ptr()),
            ctypes.c_int64(torch.get_num_threads()),
        )
        return out.view(*x.shape[:-1], self.outputs)


def has_tiles() -> bool:
    """Does the processor multiply tiles of bfloat16 (AMX), and may this process?"""
    return bool(kernels().medusa_tiles())


def kernels() -> ctypes.CDLL:
    """The library; RuntimeError where there is none."""
    found = library()
    if found is None:
        raise RuntimeError("there are no CPU kernels here: a C compiler makes them (medusa/native/build.py)")
    return found
