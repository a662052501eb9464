"""`python -m benchmarks.gpu.step_cost`: what a step costs by nodes and batch, at a known model's shapes, weights random.

Answers three questions: what share of the memory's bandwidth plain decoding uses, what a tree adds to it, and which kernels
beside the products are faster: PyTorch's, ours, or ours for a step's beginning and end as well. Steps are timed on the host,
from one result to the next: nothing is left out.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Literal, get_args

import torch
import typer

from benchmarks.command import RESULTS, console, run_command
from benchmarks.gpu.shapes import SHAPES, random_backbone, random_heads, read_bytes, typical_tree
from benchmarks.machine import describe_machine
from benchmarks.report import Grid, save
from medusa.attention import GpuKernels, parse_gpu_kernels
from medusa.backbone import Backbone, parse_device, parse_dtype
from medusa.config import SamplingParams
from medusa.decoder import Decoder
from medusa.sampling import SamplingRows

NODES = (1, 2, 4, 8, 16, 32, 64)
BATCHES = (1, 4, 16, 64)
WARM_UP_STEPS = 2  # the first one records a graph
LmHeads = Literal["shared", "own"]
Costs = dict[int, dict[int, float]]  # batch → nodes → median seconds


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The steps of one kind of heads by one kind of kernels."""

    lm_heads: LmHeads
    kernel: GpuKernels
    seconds: Costs

    @property
    def name(self) -> str:
        return f"{self.lm_heads} lm_heads, {self.kernel} kernels"

    def overhead(self, batch: int) -> float:
        """The largest tree's step over the plain one's."""
        row = self.seconds[batch]
        return row[max(row)] / row[min(row)]


def parse_lm_heads(name: str) -> LmHeads:
    if name not in get_args(LmHeads):
        raise ValueError(f"unknown lm_heads {name!r}; choose one of {', '.join(get_args(LmHeads))}")
    return name  # type: ignore[return-value]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device, *, num_bytes: int, repeats: int = 10) -> float:
    """Bytes per second, read and written, of copying `num_bytes` from one place in memory to another: the best of all."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(repeats):
        synchronise(device)
        began = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        best = min(best, time.perf_counter() - began)
    return 2 * num_bytes / best


def step_seconds(decoder: Decoder, *, batch: int, nodes: int, context: int, repeats: int) -> float:
    """Median time of a greedy step of `batch` sequences that hold `context` positions each."""
    device = decoder.backbone.device
    rows = SamplingRows.of([SamplingParams()] * batch, device)
    times = []
    for _ in range(WARM_UP_STEPS + repeats):
        decoder.pretend(batch, context)
        synchronise(device)
        began = time.perf_counter()
        decoder.step(batch, rows, nodes=nodes)
        times.append(time.perf_counter() - began)
    return median(times[WARM_UP_STEPS:])


def measure(
    backbone: Backbone,
    lm_heads: LmHeads,
    *,
    kernel: GpuKernels,
    nodes: Sequence[int],
    batches: Sequence[int],
    context: int,
    repeats: int,
    graphs: bool,
) -> Measured:
    assert backbone.fused is not None
    backbone.fused.gpu_kernels = kernel
    tree = typical_tree(max(nodes))
    decoder = Decoder(
        backbone, random_heads(backbone, lm_heads), tree, num_slots=max(batches),
        context_length=context + tree.num_nodes, prefill_chunk=tree.num_nodes, graphs=graphs,
    )  # fmt: skip
    seconds = {
        batch: {n: step_seconds(decoder, batch=batch, nodes=n, context=context, repeats=repeats) for n in nodes}
        for batch in batches
    }
    return Measured(lm_heads=lm_heads, kernel=kernel, seconds=seconds)


def grids(measured: Sequence[Measured], shares: Mapping[str, Mapping[int, float]]) -> list[Grid]:
    """Milliseconds of every size, and what they come to."""
    tables = [
        Grid(
            title=f"Milliseconds a step: {one.name}",
            columns=("sequences", *(f"{n} nodes" for n in next(iter(one.seconds.values())))),
            rows=[[str(batch), *(f"{s * 1e3:.2f}" for s in row.values())] for batch, row in one.seconds.items()],
        )
        for one in measured
    ]
    told = [
        [f"{one.name}, {batch} sequences", f"{one.overhead(batch):.3f}", f"{100 * shares[one.name][batch]:.1f} %"]
        for one in measured
        for batch in one.seconds
    ]
    columns = ("", "largest tree / plain step", "plain step's share of the copy bandwidth")
    return [Grid(title="Overhead and bandwidth", columns=columns, rows=told), *tables]


def main(
    shapes: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "vicuna-7b",
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    kernel: Annotated[
        list[str] | None, typer.Option(help="torch, triton, fused; repeat it; all on CUDA without")
    ] = None,
    lm_heads: Annotated[list[str] | None, typer.Option(help="shared, own; repeat it; both without")] = None,
    nodes: Annotated[list[int] | None, typer.Option(min=1, help="repeat it; 1 to 64 without")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="repeat it; 1, 4, 16, 64 without")] = None,
    context: Annotated[int, typer.Option(min=1, help="positions that each sequence holds")] = 1024,
    repeats: Annotated[int, typer.Option(min=1)] = 20,
    graphs: Annotated[bool, typer.Option("--graphs/--eager", help="CUDA graphs, or kernel by kernel")] = True,
    copy_mib: Annotated[int, typer.Option(min=1, help="MiB of the copy that bandwidth is measured by")] = 2048,
    output: Annotated[Path, typer.Option(help="folder of the .md and .json")] = RESULTS,
) -> None:
    """Time decode steps at a model's shapes."""
    machine = describe_machine("benchmarks.gpu.step_cost")
    where = parse_device(device)
    bandwidth = copy_bandwidth(where, num_bytes=copy_mib * 2**20)
    sizes, batches = sorted({1, *(nodes or NODES)}), sorted(set(batch or BATCHES))
    measured: list[Measured] = []
    shares: dict[str, dict[int, float]] = {}
    backbone = random_backbone(shapes, device=where, dtype=parse_dtype(dtype))
    kernels = kernel or (get_args(GpuKernels) if where.type == "cuda" else ["torch"])
    for chosen in [parse_gpu_kernels(name, where, backbone.dtype) for name in kernels]:
        for kind in [parse_lm_heads(name) for name in lm_heads or ["shared", "own"]]:
            one = measure(
                backbone,
                kind,
                kernel=chosen,
                nodes=sizes,
                batches=batches,
                context=context,
                repeats=repeats,
                graphs=graphs,
            )
            measured.append(one)
            shares[one.name] = {
                b: read_bytes(backbone, rows=b, context=context) / row[1] / bandwidth for b, row in one.seconds.items()
            }
            console.print(f"{one.name}: done", highlight=False)
            gc.collect()  # the decoder's cache, before the next one's
    tables = grids(measured, shares)
    for table in tables:
        table.show(console)
    page = save(
        output,
        f"step-cost-{shapes}-{dtype}-{where.type}-{datetime.now(UTC):%Y%m%d-%H%M}",
        title=f"Cost of a decode step at {shapes} shapes",
        machine=machine,
        settings={
            "shapes": shapes, "weights": "random", "dtype": dtype, "context": context, "repeats": repeats,
            "graphs": graphs and where.type == "cuda", "copy bandwidth GB/s": round(bandwidth / 1e9, 1),
        },
        grids=tables,
        figures={one.name: {"seconds": one.seconds, "share": shares[one.name]} for one in measured},
    )  # fmt: skip
    console.print(f"\nwritten to {page.name}", highlight=False)


if __name__ == "__main__":
    run_command(main)
