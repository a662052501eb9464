"""Products with a weight that is prepared once, by the kernel that suits the device. Knows tensors; knows no layers.

    I inputs, O outputs

PyTorch's plain product re-orders a low-precision weight on every call, and emulates bf16 on a CPU that lacks it. Packing
the weight ahead halves a small step on a CPU; on a GPU the plain product is the right one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from medusa.native.build import library
from medusa.native.linear import PackedWeight, has_tiles

Linear = Callable[[Tensor], Tensor]
TYPICAL_ROWS = 16  # what oneDNN lays a weight out for: a step's nodes


@dataclass(frozen=True)
class PlainProduct:
    """PyTorch's own product with a weight that stays as it is."""

    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Kernel(Enum):
    """How x·weightᵀ is computed, and in what type activations are kept around it."""

    PLAIN = "plain"  # PyTorch's own; activations in the weight's type
    ONEDNN = "onednn"  # bf16 weights in oneDNN's own layout, on CPUs with bf16 arithmetic; bf16 activations
    NATIVE = "native"  # our own kernels: bf16 weights; float32 activations, rounded to bf16 where the CPU has AMX
    NATIVE_INT8 = "native int8"  # int8 weights; float32 activations, rounded to 16 bits of each row's largest
    FBGEMM = "fbgemm"  # weights as packed fp16, float32 activations and arithmetic: for CPUs that emulate the type

    def activation_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self in (*NATIVE, Kernel.FBGEMM) else weight_dtype

    def prepare(self, weight: Tensor) -> Linear:
        """weight [O,I] → a function x [...,I] → x·weightᵀ [...,O]."""
        weight = weight.detach()
        if self is Kernel.ONEDNN:
            return _onednn(weight)
        if self in NATIVE:
            return PackedWeight.of(weight, int8=self is Kernel.NATIVE_INT8)
        if self is Kernel.FBGEMM:
            return _fbgemm(weight)
        return PlainProduct(weight)


NATIVE = (Kernel.NATIVE, Kernel.NATIVE_INT8)


def multiplies_bfloat16() -> bool:
    """Has this processor arithmetic for bfloat16? Where it has none, PyTorch emulates it, many times slower than float32."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_tile"))


def kernel_for(dtype: torch.dtype, device: torch.device) -> Kernel:
    """The fastest kernel for weights of `dtype` here. float32 and float64 stay plain: they are what others are held to."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return Kernel.PLAIN
    has = torch.cpu.get_capabilities()
    if dtype == torch.bfloat16:
        compiled = library() is not None
        if compiled and has_tiles():
            return Kernel.NATIVE
        if multiplies_bfloat16() and torch.backends.mkldnn.enabled:
            return Kernel.ONEDNN
        if compiled:
            return Kernel.NATIVE
    if has.get("avx2") and "fbgemm" in torch.backends.quantized.supported_engines:
        return Kernel.FBGEMM
    return Kernel.PLAIN


def _onednn(weight: Tensor) -> Linear:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TYPICAL_ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda x: multiply(x, packed, None, "none", [], "")


def _fbgemm(weight: Tensor) -> Linear:
    """Values under 6e-8 become zero, the rest keeps all bits of bf16 that fp16 can hold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)
    multiply = torch.ops.quantized.linear_dynamic_fp16
    return lambda x: multiply(x, packed)
