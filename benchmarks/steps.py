"""`python -m benchmarks.steps`: what one decoding step costs with several sets of heads, by tree size, in turns.

A step is all of it: candidates, verification, acceptance, compaction. Its cost beside a plain step, the overhead, divides
the acceleration rate that `benchmarks.replay` counts: rate / overhead is the speedup. Every round times every set of
heads at every size once, so that drift falls on all alike; the first rounds warm up.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer

from benchmarks.command import RESULTS, console, labelled, run_command
from benchmarks.machine import describe_machine, num_cores
from benchmarks.report import Grid, save
from medusa.backbone import Backbone, load_backbone
from medusa.checkpoint import load_checkpoint
from medusa.config import SamplingParams
from medusa.decoder import Decoder
from medusa.pretrained import heads_folder
from medusa.provision import DEFAULT_BACKBONE
from medusa.sampling import SamplingRows

WARM_UP_ROUNDS = 3


def decoder_of(backbone: Backbone, heads: str, *, nodes: int, batch: int, length: int) -> Decoder:
    """A decoder of these heads with their tree of `nodes`; smaller ones are its first nodes."""
    checkpoint = load_checkpoint(heads_folder(heads, backbone.name), backbone=backbone)
    tree = checkpoint.tree(nodes)
    return Decoder(backbone, checkpoint.heads, tree, num_slots=batch, context_length=length, prefill_chunk=8)


def time_steps(
    decoders: Mapping[str, Decoder], sizes: list[int], *, batch: int, length: int, rounds: int
) -> dict[str, dict[int, list[float]]]:
    """Heads → nodes → seconds of a step of `batch` sequences that are `length` long, one for each round."""
    found: dict[str, dict[int, list[float]]] = {name: {nodes: [] for nodes in sizes} for name in decoders}
    for turn in range(WARM_UP_ROUNDS + rounds):
        for nodes in sizes:
            for name, decoder in decoders.items():
                rows = SamplingRows.of([SamplingParams()] * batch, decoder.backbone.device)
                decoder.pretend(batch, length)
                began = time.perf_counter()
                decoder.step(batch, rows, nodes=nodes)  # ends with a transfer to the host, so the device is done
                if turn >= WARM_UP_ROUNDS:
                    found[name][nodes].append(time.perf_counter() - began)
    return found


def main(
    heads: Annotated[
        list[str] | None, typer.Option(help="'default', 'hydra', 'medusa2' or a heads folder; repeat it")
    ] = None,
    tree: Annotated[list[int] | None, typer.Option(help="nodes of the trees; repeat it (default: 6, 16, 64)")] = None,
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
    sizes = sorted({1, *(tree or (6, 16, 64))})
    model = load_backbone(backbone, dtype=dtype, device=device)
    decoders = {
        label: decoder_of(model, name, nodes=sizes[-1], batch=batch, length=length + 1)
        for label, name in labelled(heads or ["default"]).items()
    }
    seconds = time_steps(decoders, sizes, batch=batch, length=length, rounds=rounds)
    plain = median(value for by in seconds.values() for value in by[1])
    table = Grid(
        title=f"One step at batch {batch}; plain {1000 * plain:.1f} ms",
        columns=("heads, nodes", "median ms", "min ms", "median / plain"),
        rows=[
            [f"{name}, {n}", f"{1000 * median(by[n]):.1f}", f"{1000 * min(by[n]):.1f}", f"{median(by[n]) / plain:.3f}"]
            for n in sizes[1:]
            for name, by in seconds.items()
        ],
    )
    table.show(console)
    if save_results:
        kind = str(model.dtype).removeprefix("torch.")
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
