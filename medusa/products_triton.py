"""Products of few rows in Triton, with the norm before and the gate or the sum after as part of them. Knows tensors alone.

    M rows, I inputs, O outputs

A decode step reads weights and does little else. A library's products read them at a good rate, but begin and end one by one
with small kernels between. Here those are part of the product, and where the GPU can (`can_overlap`), a kernel asks for its
first weights before the one before it has ended ("programmatic dependent launch"). Import this where Triton is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from medusa.overlap_triton import launch_options, num_processors, wait_for_previous

LEAST_ROWS = 16  # of a tensor core's operand
ROUND_BYTES = 256  # of each output's weights, and each row's inputs, in one round
SHARED_BYTES = 96 * 1024  # of a processor's shared memory: two programs fit a Hopper GPU's, one a smaller GPU's
DTYPES = (torch.bfloat16, torch.float32)  # float16 may overflow between a norm's gain and its scale


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How a product is cut: a program's outputs, the inputs of one round, its warps, and rounds that are loaded ahead."""

    outputs: int
    inputs: int
    warps: int
    stages: int


@triton.jit
def _tile(weight, place, is_output, size_in):
    """Weights [OUTS,INS] of the inputs at `place`; `weight` [OUTS,1] points to each output's first."""
    return tl.load(weight + place[None, :], mask=is_output[:, None] & (place < size_in)[None, :], other=0.0)


@triton.jit
def _read(x, gain, place, row, is_row, squares, size_in, NORM: tl.constexpr):
    """x [INS,ROWS] of the inputs at `place`, times their gains, and the squares of the rows so far."""
    inside = place < size_in
    where = x + row[None, :].to(tl.int64) * size_in + place[:, None]
    read = tl.load(where, mask=inside[:, None] & is_row[None, :], other=0.0)
    if NORM:
        wide = read.to(tl.float32)
        squares += tl.sum(wide * wide, axis=0)
        read = (wide * tl.load(gain + place, mask=inside, other=0.0).to(tl.float32)[:, None]).to(read.dtype)
    return read, squares


@triton.jit
def _product(x, weight, gain, residual, out, num_rows, size_in, size_out, eps, NORM: tl.constexpr, GATE: tl.constexpr,
             ADD: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, PRECISION: tl.constexpr,
             OVERLAP: tl.constexpr):  # fmt: skip
    """out [M,O] = x·weightᵀ, of the RMS norm of x with NORM, to which the residual [M,O] is added with ADD. With GATE the weight
    has 2O rows, gates first: SiLU(gate) · up. The norm's scale is one number a row: found on the way, multiplied last."""
    output = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_output, is_row = output < size_out, row < num_rows
    gate = weight + output[:, None].to(tl.int64) * size_in
    up = gate + size_out.to(tl.int64) * size_in
    place = tl.arange(0, INS)
    squares = tl.zeros([ROWS], tl.float32)
    ups = tl.zeros([OUTS, ROWS], tl.float32)

    # The first weights are on their way before the kernel before this one, whose results they meet, has ended.
    gate_tile = _tile(gate, place, is_output, size_in)
    if GATE:
        up_tile = _tile(up, place, is_output, size_in)
    wait_for_previous(OVERLAP)
    read, squares = _read(x, gain, place, row, is_row, squares, size_in, NORM)
    gates = tl.dot(gate_tile, read, input_precision=PRECISION)
    if GATE:
        ups = tl.dot(up_tile, read, input_precision=PRECISION)
    for start in range(INS, size_in, INS):
        read, squares = _read(x, gain, start + place, row, is_row, squares, size_in, NORM)
        gates = tl.dot(_tile(gate, start + place, is_output, size_in), read, gates, input_precision=PRECISION)
        if GATE:
            ups = tl.dot(_tile(up, start + place, is_output, size_in), read, ups, input_precision=PRECISION)

    if NORM:
        scale = 1 / tl.sqrt(squares / size_in + eps)
        gates *= scale[None, :]
        ups *= scale[None, :]
    if GATE:
        gates = gates / (1 + tl.exp(-gates)) * ups
    target = row[None, :].to(tl.int64) * size_out + output[:, None]
    written = is_output[:, None] & is_row[None, :]
    if ADD:
        gates += tl.load(residual + target, mask=written, other=0.0).to(tl.float32)
    tl.store(out + target, gates.to(out.dtype.element_ty), mask=written)


def product(
    x: Tensor,
    weight: Tensor,
    *,
    gain: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
    blocks: Blocks | None = None,
    overlap: bool = False,
) -> Tensor:
    """x [M,I], weight [O,I] ([2O,I] where `gated`) → [M,O] in x's type, one of DTYPES; sums are float32.

    With a `gain` [I] it is the RMS norm of x that is multiplied; `gated` joins the two halves of the outputs, gates first, as
    SiLU(gate) · up; `residual` [M,O] is added. With `overlap` (see `can_overlap`) weight and gain must not be what the kernel
    before this one writes.
    """
    num_rows, size_in = x.shape
    size_out = weight.shape[0] // (2 if gated else 1)
    assert x.dtype in DTYPES and all(t.is_contiguous() for t in (x, weight, residual) if t is not None)
    rows = min(64, max(LEAST_ROWS, triton.next_power_of_2(num_rows)))
    cut = blocks or blocks_for(
        size_out, rows=rows, gated=gated, processors=num_processors(x.device), element_size=x.element_size()
    )
    out = torch.empty(num_rows, size_out, dtype=x.dtype, device=x.device)
    _product[(triton.cdiv(size_out, cut.outputs), triton.cdiv(num_rows, rows))](
        x, weight, x if gain is None else gain, x if residual is None else residual, out, num_rows, size_in, size_out, eps,
        NORM=gain is not None, GATE=gated, ADD=residual is not None, ROWS=rows, OUTS=cut.outputs, INS=cut.inputs,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", OVERLAP=overlap, num_warps=cut.warps,
        num_stages=cut.stages, **launch_options(overlap),
    )  # fmt: skip
    return out


def blocks_for(size_out: int, *, rows: int, gated: bool, processors: int, element_size: int) -> Blocks:
    """The largest share of the outputs by which all of a GPU's processors still have work, and as many rounds ahead as there is
    room for. The number of rows changes no order of sums. Guessed from shapes, not measured: `benchmarks.gpu.products` tries
    others beside it."""
    fitting = [share for share in (64, 32) if triton.cdiv(size_out, share) >= 3 * processors // 4]
    outputs = fitting[0] if fitting else 16
    inputs = ROUND_BYTES // element_size
    stages = SHARED_BYTES // (ROUND_BYTES * (outputs * (2 if gated else 1) + rows))
    return Blocks(outputs=outputs, inputs=inputs, warps=4, stages=max(2, min(5, stages)))
