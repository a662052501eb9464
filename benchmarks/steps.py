"""`python -m benchmarks.steps`: what one decoding step costs with several sets of heads, by tree size, in turns.

A step is all of it: candidates, verification, acceptance, compaction. Its cost beside a plain step, the overhead, divides
the acceleration rate that `benchmarks.replay` counts: rate / overhead is the speedup. Every round times every set of
heads at every size once, so that drift falls on all alike; the first rounds warm up.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer

from benchmarks.command import RESULTS, console, labelled, run_command
from benchmarks.machine import describe_machine, num_cores
from benchmarks.report import Grid, save
from medusa.backbone import Backbone, dtype_name, load_backbone
from medusa.checkpoint import load_checkpoint
from medusa.config import SamplingParams
from medusa.decoder import Decoder
from medusa.generate import Model
from medusa.pretrained import heads_folder
from medusa.provision import DEFAULT_BACKBONE
from medusa.sampling import SamplingRows
from medusa.tree import Tree

WARM_UP_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A decoder whose steps of `nodes` nodes are timed."""

    decoder: Decoder
    nodes: int


def timed_steps(backbone: Backbone, heads: str, trees: Sequence[str], *, batch: int, length: int) -> dict[str, Timed]:
    """Tree → its steps with these heads; "1", the plain step, too. Static trees are the first nodes of one decoder's."""
    checkpoint = load_checkpoint(heads_folder(heads, backbone.name), backbone=backbone)
    model = Model(backbone, checkpoint.heads, checkpoint)
    shapes = {name: model.resolve_tree(name) for name in trees}
    static = max((shape for shape in shapes.values() if isinstance(shape, Tree)), key=lambda tree: tree.num_nodes)
    make = partial(Decoder, backbone, checkpoint.heads, num_slots=batch, context_length=length, prefill_chunk=8)
    shared = make(static)
    return {
        name: Timed(decoder=shared if isinstance(shape, Tree) else make(shape), nodes=shape.num_nodes)
        for name, shape in shapes.items()
    }


def time_steps(timed: Mapping[str, Timed], *, batch: int, length: int, rounds: int) -> dict[str, list[float]]:
    """Name → seconds of a step of `batch` sequences that are `length` long, one for each round."""
    found: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(WARM_UP_ROUNDS + rounds):
        for name, one in timed.items():
            rows = SamplingRows.of([SamplingParams()] * batch, one.decoder.backbone.device)
            one.decoder.pretend(batch, length)
            began = time.perf_counter()
            one.decoder.step(batch, rows, nodes=one.nodes)  # ends with a transfer to the host, so the device is done
            if turn >= WARM_UP_ROUNDS:
                found[name].append(time.perf_counter() - began)
    return found


def main(
    heads: Annotated[
        list[str] | None, typer.Option(help="'default', 'plain', 'medusa2' or a heads folder; repeat it")
    ] = None,
    tree: Annotated[
        list[str] | None, typer.Option(help="nodes of the trees, or dynamic:N; repeat it (default: 6, 16, 64)")
    ] = None,
    backbone: Annotated[str, typer.Option(help="built-in name, model folder or hub id")] = DEFAULT_BACKBONE,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda; chosen by itself without")] = None,
    threads: Annotated[int, typer.Option(help="torch threads; 0: one for each core")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="sequences of a step")] = 1,
    length: Annotated[int, typer.Option(min=1, help="tokens behind each sequence")] = 256,
    rounds: Annotated[int, typer.Option(min=1)] = 30,
    output: Annotated[Path, typer.Option(help="folder of the .md and .json")] = RESULTS,
    save_results: Annotated[bool, typer.Option("--save/--no-save")] = True,
) -> None:
    """Compare the step times of sets of heads."""
    torch.set_num_threads(threads or num_cores())
    machine = describe_machine("benchmarks.steps")
    trees = list(dict.fromkeys(["1", *(tree or ("6", "16", "64"))]))
    model = load_backbone(backbone, dtype=dtype, device=device)
    timed = {
        f"{label}, {name}": steps
        for label, folder in labelled(heads or ["default"]).items()
        for name, steps in timed_steps(model, folder, trees, batch=batch, length=length + 1).items()
    }
    seconds = time_steps(timed, batch=batch, length=length, rounds=rounds)
    plain = median(value for name, values in seconds.items() if timed[name].nodes == 1 for value in values)
    table = Grid(
        title=f"One step at batch {batch}; plain {1000 * plain:.1f} ms",
        columns=("heads, tree", "median ms", "min ms", "median / plain"),
        rows=[
            [name, f"{1000 * median(all_of):.1f}", f"{1000 * min(all_of):.1f}", f"{median(all_of) / plain:.3f}"]
            for name, all_of in seconds.items()
            if timed[name].nodes > 1
        ],
    )
    table.show(console)
    if save_results:
        kind = dtype_name(model.dtype)
        settings = {"backbone": backbone, "dtype": kind, "batch": batch, "length": length, "rounds": rounds}
        stem = f"steps-{kind}-{model.device.type}-{datetime.now(UTC):%Y%m%d-%H%M}"
        figures: dict[str, object] = {"seconds": seconds}
        page = save(
            output,
            stem,
            title=f"Step times, {kind}",
            machine=machine,
            settings=settings,
            grids=[table],
            figures=figures,
        )
        console.print(f"saved {page}")


if __name__ == "__main__":
    run_command(main)
