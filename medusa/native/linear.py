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
from medusa.native.memory import held

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
TILES = {torch.bfloat16: 3, torch.int8: 4}  # for processors that multiply tiles
SIDE = 16  # outputs of a tile; a panel is two of them wide
DEEP = {torch.bfloat16: 32, torch.int8: 64}  # inputs of a tile
MOST_INPUTS = 65536  # whose products of bytes no 32 bits overflow


class CWeight(ctypes.Structure):
    """`Weight` of products.h."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("type", ctypes.c_int64),
    )


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight [O,I] as products.h reads it; call it for x·weightᵀ, float32 in and out.

    `panels` [O/2L,I/S,L,S,2]: L lanes of a vector, S inputs whose weights share a word (two of int8); of `tiles`
    [O/32,I/32,2,16,16,2] or, of int8, [O/32,I/64,2,16,16,4]. Products with int8 round x to 16 bits of its row's largest, those
    with tiles of bfloat16 to bfloat16.
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
        if int8 and not fits_int8(inputs):
            raise ValueError(
                f"a weight in int8 must have an even number of inputs, {MOST_INPUTS} at most, got {inputs}"
            )
        tiles = (int8 or weight.dtype == torch.bfloat16) and has_tiles()
        lanes = SIDE if tiles else kernels().medusa_lanes()
        weight, scales = F.pad(weight.detach(), (0, 0, 0, -outputs % (2 * lanes))), None
        if int8:
            scales = weight.float().abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
            weight = (weight.float() / scales[:, None]).round().to(torch.int8)
        panels = _in_tiles(weight) if tiles else _in_vectors(weight, lanes)
        return cls(panels=held(panels), scales=scales, outputs=outputs, inputs=inputs, tiles=tiles)

    def c(self) -> CWeight:
        """What the kernels read; valid while this object lives."""
        return CWeight(
            panels=self.panels.data_ptr(),
            scales=None if self.scales is None else self.scales.data_ptr(),
            outputs=self.outputs,
            inputs=self.inputs,
            type=(TILES if self.tiles else TYPES)[self.panels.dtype],
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x [...,I] → [...,O]."""
        flat = x.reshape(-1, self.inputs).contiguous()
        assert flat.dtype == torch.float32
        rows = flat.shape[0]
        out = torch.empty(rows, self.outputs)
        weight = ctypes.byref(self.c())
        work = torch.empty(kernels().medusa_linear_bytes(weight, ctypes.c_int64(rows)), dtype=torch.uint8)
        kernels().medusa_linear(
            weight,
            ctypes.c_void_p(flat.data_ptr()),
            ctypes.c_int64(rows),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_void_p(work.data_ptr()),
            ctypes.c_int64(torch.get_num_threads()),
        )
        return out.view(*x.shape[:-1], self.outputs)


def fits_int8(inputs: int) -> bool:
    """Can a weight of so many inputs be packed in int8?"""
    return inputs % 2 == 0 and inputs <= MOST_INPUTS


def _in_tiles(weight: Tensor) -> Tensor:
    deep = DEEP[weight.dtype]
    padded = F.pad(weight, (0, -weight.shape[1] % deep))
    in_a_word = deep // SIDE
    return padded.view(-1, 2, SIDE, padded.shape[1] // deep, SIDE, in_a_word).permute(0, 3, 1, 4, 2, 5)


def _in_vectors(weight: Tensor, lanes: int) -> Tensor:
    shared = 2 if weight.dtype == torch.int8 else 1
    panels = weight.view(-1, 2, lanes, weight.shape[1] // shared, shared).permute(0, 3, 2, 4, 1)
    # One weight of float32 fills a word, so the halves lie one behind the other.
    return panels.transpose(2, 4) if weight.dtype == torch.float32 else panels


def has_tiles() -> bool:
    """Does the processor multiply tiles (AMX), and may this process?"""
    return bool(kernels().medusa_tiles())


def kernels() -> ctypes.CDLL:
    """The library; RuntimeError where there is none."""
    found = library()
    if found is None:
        raise RuntimeError("there are no CPU kernels here: a C compiler makes them (medusa/native/build.py)")
    return found
