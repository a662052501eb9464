"""`python -m benchmarks.gpu.products`: would products of our own make a decode step of few rows cheaper on a GPU?

    M rows of a step, I inputs and O outputs of a product

Layers of a known model's shapes and random weights, by cuBLAS's products with small kernels between, and by those of
`medusa.products_triton`, which gpu_kernels="fused" decodes by: as it cuts them, and as was fastest of many cuts. Attention is
left out. What wins here is what a step should be made of.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import triton
import typer
from torch import Tensor

from benchmarks.command import RESULTS, console, run_command
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.step_cost import copy_bandwidth, synchronise
from benchmarks.machine import describe_machine
from benchmarks.report import Grid, save
from medusa import llama_triton
from medusa.backbone import parse_device, parse_dtype
from medusa.overlap_triton import can_overlap
from medusa.products_triton import Blocks, product

ROWS = (1, 16, 64)
EPS = 1e-5
WARM_UP_RUNS = 2
Part = Literal["query_key_value", "out", "gate_up", "down"]
PARTS: tuple[Part, ...] = ("query_key_value", "out", "gate_up", "down")


SWEEP = [
    Blocks(outputs=o, inputs=i, warps=w, stages=s)
    for (o, w), i, s in itertools.product([(16, 4), (32, 4), (64, 4), (128, 8)], [64, 128, 256], [3, 5])
]


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


def by_own(
    layers: Sequence[Layer], hidden: Tensor, cuts: Mapping[Part, Blocks] | None = None, *, overlap: bool = False
) -> Tensor:
    """The same by products that do what lies between them, cut so, or as a step cuts them."""
    size = hidden.shape[1]
    for layer in layers:
        joined = own_product(layer, "query_key_value", hidden, hidden, cuts, overlap=overlap)
        hidden = own_product(layer, "out", joined[:, :size].contiguous(), hidden, cuts, overlap=overlap)
        inner = own_product(layer, "gate_up", hidden, hidden, cuts, overlap=overlap)
        hidden = own_product(layer, "down", inner, hidden, cuts, overlap=overlap)
    return hidden


def own_product(
    layer: Layer,
    part: Part,
    x: Tensor,
    hidden: Tensor,
    cuts: Mapping[Part, Blocks] | None,
    *,
    overlap: bool = False,
) -> Tensor:
    """That product of x with what belongs to it: the norm before, the gate, or the sum with `hidden`."""
    weight: Tensor = getattr(layer, part)
    multiply = partial(product, x, weight, eps=EPS, blocks=cuts[part] if cuts else None, overlap=overlap)
    if part == "query_key_value":
        return multiply(gain=layer.gains[0])
    if part == "gate_up":
        return multiply(gain=layer.gains[1], gated=True)
    return multiply(residual=hidden)


def one_part(layers: Sequence[Layer], part: Part, hidden: Tensor, inner: Tensor, blocks: Blocks) -> None:
    """That product alone, of every layer in turn: more weights than a cache holds."""
    for layer in layers:
        own_product(layer, part, inner if part == "down" else hidden, hidden, {part: blocks})


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
            "ours": partial(by_own, layers, hidden),
            "ours, best cuts": partial(by_own, layers, hidden, chosen),
        }
        if can_overlap(where):
            runs["ours, overlapped"] = partial(by_own, layers, hidden, overlap=True)
            runs["ours, best cuts, overlapped"] = partial(by_own, layers, hidden, chosen, overlap=True)
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
