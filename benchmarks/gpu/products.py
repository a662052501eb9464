"""`python -m benchmarks.gpu.products`: would products of our own make a decode step of few rows cheaper on a GPU?

    M rows of a step, I inputs and O outputs of a product

Such a step reads weights and does little else. cuBLAS's products read them at a good rate but begin and end one by one, with
small kernels between; here norm, gating and residual are part of the product, and, with `overlap`, a kernel starts on its
weights before the one before it has ended. Layers of a known model's shapes and random weights run both ways, attention
left out. What wins here is what the step should be made of.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
import typer
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from benchmarks.command import RESULTS, console, run_command
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.step_cost import copy_bandwidth, synchronise
from benchmarks.machine import describe_machine
from benchmarks.report import Grid, save
from medusa import llama_triton
from medusa.backbone import parse_device, parse_dtype

ROWS = (1, 16, 64)
EPS = 1e-5
LEAST_ROWS = 16  # of a tensor core's operand
WARM_UP_RUNS = 2
Part = Literal["query_key_value", "out", "gate_up", "down"]
PARTS: tuple[Part, ...] = ("query_key_value", "out", "gate_up", "down")


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How a product is cut: a program's outputs, the inputs of one round, its warps, rounds that are loaded ahead; and whether it
    starts before the kernel before it has ended."""

    outputs: int
    inputs: int
    warps: int
    stages: int
    overlap: bool = False


SWEEP = [
    Blocks(outputs=o, inputs=i, warps=w, stages=s)
    for (o, w), i, s in itertools.product([(16, 4), (32, 4), (64, 4), (128, 8)], [64, 128, 256], [3, 5])
]


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
             ADD: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
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
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    read, squares = _read(x, gain, place, row, is_row, squares, size_in, NORM)
    gates = tl.dot(gate_tile, read)
    if GATE:
        ups = tl.dot(up_tile, read)
    for start in range(INS, size_in, INS):
        read, squares = _read(x, gain, start + place, row, is_row, squares, size_in, NORM)
        gates = tl.dot(_tile(gate, start + place, is_output, size_in), read, gates)
        if GATE:
            ups = tl.dot(_tile(up, start + place, is_output, size_in), read, ups)

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
    blocks: Blocks,
    *,
    gain: Tensor | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """x [M,I], weight [O,I] ([2O,I] where `gated`) → [M,O] in x's type: see `_product`. Sums are float32."""
    num_rows, size_in = x.shape
    size_out = weight.shape[0] // (2 if gated else 1)
    out = torch.empty(num_rows, size_out, dtype=x.dtype, device=x.device)
    rows = min(64, max(LEAST_ROWS, triton.next_power_of_2(num_rows)))
    options = {"launch_pdl": True} if blocks.overlap else {}
    _product[(triton.cdiv(size_out, blocks.outputs), triton.cdiv(num_rows, rows))](
        x, weight, x if gain is None else gain, x if residual is None else residual, out, num_rows, size_in, size_out, EPS,
        NORM=gain is not None, GATE=gated, ADD=residual is not None, ROWS=rows, OUTS=blocks.outputs, INS=blocks.inputs,
        OVERLAP=blocks.overlap, num_warps=blocks.warps, num_stages=blocks.stages, **options,
    )  # fmt: skip
    return out


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A decoder layer's weights, random. Queries stand in for what attention would give."""

    gains: Tensor
    query_key_value: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor

    @staticmethod
    def random(shapes: str, *, device: torch.device, dtype: torch.dtype) -> Layer:
        of = SHAPES[shapes]
        size, inner, heads = of["hidden_size"], of["intermediate_size"], of["num_attention_heads"]
        keys = of["num_key_value_heads"] * (size // heads)

        def draw(outputs: int, inputs: int) -> Tensor:
            return torch.randn(outputs, inputs, device=device).mul_(inputs**-0.5).to(dtype)

        return Layer(
            gains=1 + draw(2, size),
            query_key_value=draw(size + 2 * keys, size), out=draw(size, size),
            gate_up=draw(2 * inner, size), down=draw(size, inner),
        )  # fmt: skip

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in vars(self).values())


def by_library(layers: Sequence[Layer], hidden: Tensor) -> Tensor:
    """hidden [M,D] through the layers as decoding does it now: cuBLAS's products, our kernels between them."""
    size = hidden.shape[1]
    normed = llama_triton.norm(hidden, layers[0].gains[0], EPS)
    for layer, after in zip(layers, [*layers[1:], layers[0]], strict=True):  # behind the last nothing reads the norm
        queries = F.linear(normed, layer.query_key_value)[:, :size].contiguous()
        hidden, normed = llama_triton.add_norm(hidden, F.linear(queries, layer.out), layer.gains[1], EPS)
        moved = F.linear(llama_triton.gated(F.linear(normed, layer.gate_up)), layer.down)
        hidden, normed = llama_triton.add_norm(hidden, moved, after.gains[0], EPS)
    return hidden


def by_own(layers: Sequence[Layer], hidden: Tensor, blocks: dict[Part, Blocks]) -> Tensor:
    """The same by products that do what lies between them."""
    size = hidden.shape[1]
    for layer in layers:
        joined = own_product(layer, "query_key_value", hidden, hidden, blocks["query_key_value"])
        hidden = own_product(layer, "out", joined[:, :size].contiguous(), hidden, blocks["out"])
        inner = own_product(layer, "gate_up", hidden, hidden, blocks["gate_up"])
        hidden = own_product(layer, "down", inner, hidden, blocks["down"])
    return hidden


def own_product(layer: Layer, part: Part, x: Tensor, hidden: Tensor, blocks: Blocks) -> Tensor:
    """That product of x with what belongs to it: the norm before, the gate, or the sum with `hidden`."""
    weight: Tensor = getattr(layer, part)
    if part == "query_key_value":
        return product(x, weight, blocks, gain=layer.gains[0])
    if part == "gate_up":
        return product(x, weight, blocks, gain=layer.gains[1], gated=True)
    return product(x, weight, blocks, residual=hidden)


def one_part(layers: Sequence[Layer], part: Part, hidden: Tensor, inner: Tensor, blocks: Blocks) -> None:
    """That product alone, of every layer in turn: more weights than a cache holds."""
    for layer in layers:
        own_product(layer, part, inner if part == "down" else hidden, hidden, blocks)


def seconds_of(run: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """Median time of a run, on a GPU replayed as one CUDA graph."""
    for _ in range(WARM_UP_RUNS):
        run()
    synchronise(device)
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    times = []
    for _ in range(repeats):
        synchronise(device)
        began = time.perf_counter()
        run()
        synchronise(device)
        times.append(time.perf_counter() - began)
    return median(times)


def best_blocks(
    layers: Sequence[Layer], hidden: Tensor, inner: Tensor, sweep: Sequence[Blocks], *, repeats: int
) -> dict[Part, Blocks]:
    """The fastest cut of each product. One that a GPU has no room for is passed over."""
    best: dict[Part, Blocks] = {}
    for part in PARTS:
        times: dict[Blocks, float] = {}
        for blocks in sweep:
            try:
                run = partial(one_part, layers, part, hidden, inner, blocks)
                times[blocks] = seconds_of(run, hidden.device, repeats=repeats)
            except triton.runtime.errors.OutOfResources:
                continue
        best[part] = min(times, key=times.__getitem__)
    return best


def main(
    shapes: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "vicuna-7b",
    device: Annotated[str, typer.Option(help="cuda; cpu through Triton's interpreter, to see that it runs")] = "cuda",
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    rows: Annotated[list[int] | None, typer.Option(min=1, help="repeat it; 1, 16, 64 without")] = None,
    num_layers: Annotated[int, typer.Option(min=1)] = 8,
    repeats: Annotated[int, typer.Option(min=1)] = 10,
    tries: Annotated[int, typer.Option(min=1, help="cuts of each product to try, of all")] = len(SWEEP),
    copy_mib: Annotated[int, typer.Option(min=1, help="MiB of the copy that bandwidth is measured by")] = 2048,
    output: Annotated[Path, typer.Option(help="folder of the .md and .json")] = RESULTS,
) -> None:
    """Time a few layers' products, cuBLAS's and ours."""
    if shapes not in SHAPES:
        raise ValueError(f"unknown shapes {shapes!r}; choose one of {', '.join(SHAPES)}")
    machine = describe_machine("benchmarks.gpu.products")
    where, kind = parse_device(device), parse_dtype(dtype)
    bandwidth = copy_bandwidth(where, num_bytes=copy_mib * 2**20)
    layers = [Layer.random(shapes, device=where, dtype=kind) for _ in range(num_layers)]
    weights = sum(layer.num_bytes for layer in layers)
    told: list[list[str]] = []
    figures: dict[str, object] = {}
    for count in rows or ROWS:
        hidden = torch.randn(count, SHAPES[shapes]["hidden_size"], device=where).to(kind)
        inner = torch.randn(count, SHAPES[shapes]["intermediate_size"], device=where).to(kind)
        chosen = best_blocks(layers, hidden, inner, SWEEP[:tries], repeats=repeats)
        runs: dict[str, Callable[[], Tensor]] = {
            "library": partial(by_library, layers, hidden),
            "ours": partial(by_own, layers, hidden, chosen),
        }
        if where.type == "cuda":
            early = {part: replace(blocks, overlap=True) for part, blocks in chosen.items()}
            runs["ours, overlapped"] = partial(by_own, layers, hidden, early)
        seconds = {name: seconds_of(run, where, repeats=2 * repeats) for name, run in runs.items()}
        want = runs["library"]().float()
        gaps = {name: float((run().float() - want).norm() / want.norm()) for name, run in runs.items()}
        for name, value in seconds.items():
            share, ratio = weights / value / bandwidth, seconds["library"] / value
            told.append(
                [
                    f"{count} rows, {name}",
                    f"{value / num_layers * 1e6:.1f}",
                    f"{ratio:.2f}",
                    f"{100 * share:.1f} %",
                    f"{gaps[name]:.1g}",
                ]
            )
        cuts = {part: vars(blocks) for part, blocks in chosen.items()}
        figures[str(count)] = {"seconds": seconds, "blocks": cuts, "gaps": gaps}
        console.print(f"{count} rows: done", highlight=False)
    table = Grid(
        title="A layer's products, attention left out",
        columns=("", "µs a layer", "times as fast as the library", "share of the copy bandwidth", "off by"),
        rows=told,
    )
    table.show(console)
    page = save(
        output,
        f"products-{shapes}-{dtype}-{where.type}-{datetime.now(UTC):%Y%m%d-%H%M}",
        title=f"Products of few rows at {shapes} shapes",
        machine=machine,
        settings={
            "shapes": shapes, "weights": "random", "dtype": dtype, "layers": num_layers, "repeats": repeats,
            "copy bandwidth GB/s": round(bandwidth / 1e9, 1),
        },
        grids=[table],
        figures=figures,
    )  # fmt: skip
    console.print(f"\nwritten to {page.name}", highlight=False)


if __name__ == "__main__":
    run_command(main)
