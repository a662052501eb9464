"""`python -m benchmarks.schemes`: what it costs to choose tokens: steps by acceptance scheme and filters, beside greedy ones.

Each step is timed whole. On a CPU "by PyTorch" are the same steps where our kernel is not used: what it replaces. Every round
times each once, so that drift falls on all alike; the first rounds warm up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer

import medusa
from benchmarks.command import RESULTS, console, run_command
from benchmarks.machine import describe_machine, num_cores
from benchmarks.report import Grid, save
from medusa import acceptance
from medusa.backbone import dtype_name
from medusa.config import SamplingParams
from medusa.decoder import Decoder
from medusa.provision import DEFAULT_BACKBONE
from medusa.sampling import SamplingRows

WARM_UP_ROUNDS = 2
GREEDY = "greedy"
HOW: dict[str, dict[str, Any]] = {
    GREEDY: {},
    "typical": dict(temperature=0.7),
    "typical, top-p 0.9": dict(temperature=0.7, top_p=0.9),
    "typical, top-k 50": dict(temperature=0.7, top_k=50),
    "rejection": dict(temperature=0.7, acceptance="rejection"),
    "rejection, top-p 0.9": dict(temperature=0.7, acceptance="rejection", top_p=0.9),
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """How tokens are chosen: a request's settings, and by our kernel or without it."""

    params: Mapping[str, Any]
    using: Callable[[], AbstractContextManager[Any]] = nullcontext


def ways(device: torch.device) -> dict[str, Way]:
    """On a CPU each also by PyTorch."""
    found = {name: Way(params=params) for name, params in HOW.items()}
    if device.type == "cpu":
        without = partial(patch.object, acceptance, "can_walk", lambda _: False)
        found |= {f"{name}, by PyTorch": Way(params=params, using=without) for name, params in HOW.items()}
    return found


def time_steps(decoder: Decoder, *, batch: int, nodes: int, length: int, rounds: int) -> dict[str, list[float]]:
    """Way → seconds of a step of `batch` sequences that are `length` long, one for each round."""
    chosen = ways(decoder.backbone.device)
    found: dict[str, list[float]] = {name: [] for name in chosen}
    for turn in range(WARM_UP_ROUNDS + rounds):
        for name, way in chosen.items():
            params = [SamplingParams(seed=turn, choice=row, **way.params) for row in range(batch)]
            rows = SamplingRows.of(params, decoder.backbone.device)
            decoder.pretend(batch, length)
            with way.using():
                began = time.perf_counter()
                decoder.step(batch, rows, nodes=nodes)  # ends with a transfer to the host, so the device is done
            if turn >= WARM_UP_ROUNDS:
                found[name].append(time.perf_counter() - began)
    return found


def main(
    backbone: Annotated[str, typer.Option(help="built-in name or model folder")] = DEFAULT_BACKBONE,
    heads: Annotated[str, typer.Option(help="'default', 'plain', 'medusa2' or a heads folder")] = "default",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32, int8")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda; chosen by itself without")] = None,
    threads: Annotated[int, typer.Option(help="torch threads; 0: one for each core")] = 0,
    tree: Annotated[int, typer.Option(min=2, help="nodes")] = 10,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="sequences of a step; repeat it; 1, 8 without")] = None,
    length: Annotated[int, typer.Option(min=1, help="tokens behind each sequence")] = 256,
    rounds: Annotated[int, typer.Option(min=1)] = 20,
    output: Annotated[Path, typer.Option(help="folder of the .md and .json")] = RESULTS,
) -> None:
    """Compare the step times of acceptance schemes."""
    torch.set_num_threads(threads or num_cores())
    machine = describe_machine("benchmarks.schemes")
    model = medusa.load(backbone, heads=heads, dtype=dtype, device=device)
    shape, batches = model.resolve_tree(tree), batch or [1, 8]
    grids: list[Grid] = []
    figures: dict[str, object] = {}
    for size in batches:
        decoder = Decoder(
            model.backbone, model.heads, shape, num_slots=size, context_length=length + 1, prefill_chunk=8
        )
        for nodes in (1, shape.num_nodes):
            seconds = time_steps(decoder, batch=size, nodes=nodes, length=length, rounds=rounds)
            greedy = median(seconds[GREEDY])
            label = f"{size} sequences, {nodes} nodes" if nodes > 1 else f"{size} sequences, plain"
            figures[label] = seconds
            grids.append(
                Grid(
                    title=label,
                    columns=("", "median ms", "min ms", "median / greedy"),
                    rows=[
                        [name, f"{1e3 * median(own):.1f}", f"{1e3 * min(own):.1f}", f"{median(own) / greedy:.2f}"]
                        for name, own in seconds.items()
                    ],
                )
            )
            grids[-1].show(console)
    kind = dtype_name(model.backbone.weight_dtype)
    page = save(
        output,
        f"schemes-{kind}-{model.backbone.device.type}-{datetime.now(UTC):%Y%m%d-%H%M}",
        title=f"What choosing tokens costs, {kind}",
        machine=machine,
        settings={"backbone": backbone, "dtype": kind, "length": length, "rounds": rounds},
        grids=grids,
        figures=figures,
    )
    console.print(f"saved {page}")


if __name__ == "__main__":
    run_command(main)
