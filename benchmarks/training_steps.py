"""`python -m benchmarks.training_steps`: whole steps of MEDUSA-1 and MEDUSA-2 beside plainly written loops.

Contenders take turns on the same rows, a fresh batch for each repeat, each in a process of its own; a first batch warms up
and shows that their losses are the same. What is left out of ours, and what naive means: `training_contenders`. MEDUSA-1's
first epoch reads hidden states from the backbone and keeps them, later epochs find them on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from benchmarks.command import RESULTS, console, run_command
from benchmarks.gpu.shapes import SHAPES
from benchmarks.machine import describe_machine, num_cores
from benchmarks.report import Grid, save
from benchmarks.training_contenders import CONTENDERS, NAIVE, Batch
from benchmarks.training_processes import TOLERANCE, Job, Step, run_in_turns
from benchmarks.training_rows import (
    ANSWER_LENGTHS,
    PROMPT_LENGTHS,
    draw_batches,
    num_labels,
    padding_share,
    random_rows,
    read_rows,
)
from medusa.config import HeadsConfig
from medusa.provision import DEFAULT_BACKBONE
from pipelines.config import TrainSection
from pipelines.dataset import length_of


def figures_of(method: str, steps: Mapping[str, Sequence[Step]], batches: Sequence[Batch]) -> dict[str, dict[str, Any]]:
    """Contender → figures of its timed steps; ratios are taken on one batch."""
    found: dict[str, dict[str, Any]] = {}
    labels, tokens = [num_labels(method, b) for b in batches[1:]], [sum(map(length_of, b)) for b in batches[1:]]
    for name, all_steps in steps.items():
        seconds = [step.seconds for step in all_steps[1:]]
        found[name] = {
            "seconds": seconds,
            "positions_per_s": median(n / s for n, s in zip(labels, seconds, strict=True)),
            "tokens_per_s": median(n / s for n, s in zip(tokens, seconds, strict=True)),
            "peak_mib": all_steps[-1].peak_mib,
            "losses": [step.loss for step in all_steps],
        }
    naive = found[NAIVE]
    for one in found.values():
        one["speed_over_naive"] = [n / s for n, s in zip(naive["seconds"], one["seconds"], strict=True)]
        one["peak_over_naive"] = one["peak_mib"] / naive["peak_mib"]
    return found


def _spread(values: Sequence[float], digits: int = 2) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in (min(values), median(values), max(values)))


def grids_of(method: str, figures: Mapping[str, Mapping[str, Any]]) -> list[Grid]:
    """What a step of each contender takes, and ours beside the naive one."""
    title = method.upper().replace("MEDUSA", "MEDUSA-")
    steps = [
        [
            name, f"{one['positions_per_s']:.0f}", f"{one['tokens_per_s']:.0f}", _spread(one["seconds"], 3),
            f"{one['peak_mib']:.0f}", f"{one['losses'][0]:.4f}",
        ]
        for name, one in figures.items()
    ]  # fmt: skip
    ratios = [
        [name, _spread(one["speed_over_naive"]), f"{one['peak_over_naive']:.3f}"]
        for name, one in figures.items()
        if name != NAIVE
    ]
    return [
        Grid(
            title=f"A step of {title}; seconds as min / median / max",
            columns=("step", "label positions/s", "tokens/s", "seconds", "peak, MiB", "first loss"),
            rows=steps,
        ),
        Grid(
            title=f"{title} beside the naive loop, on the same batch; speed as min / median / max",
            columns=("step", "speed over naive", "peak over naive"),
            rows=ratios,
        ),
    ]


def main(
    method: Annotated[list[str] | None, typer.Option(help="medusa1, medusa2; repeat it (default: both)")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Parquet with prompt_ids, response_ids; random rows without")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="rows of a step")] = 4,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    backbone: Annotated[str, typer.Option(help="built-in name, model folder or hub id")] = DEFAULT_BACKBONE,
    shapes: Annotated[str | None, typer.Option(help="random weights instead: tiny, smollm2-135m, vicuna-7b")] = None,
    num_heads: Annotated[int, typer.Option(min=1)] = 5,
    num_layers: Annotated[int, typer.Option(min=1, help="residual layers of a head")] = 1,
    dtype: Annotated[str | None, typer.Option(help="float32 (a CPU's default), bfloat16 (a GPU's)")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda")] = "cpu",
    threads: Annotated[int, typer.Option(help="torch threads; 0: one for each core")] = 0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    output: Annotated[Path, typer.Option(help="folder of the .md and .json")] = RESULTS,
    save_results: Annotated[bool, typer.Option("--save/--no-save")] = True,
) -> None:
    """Compare training steps with plain loops, in label positions a second and in memory."""
    machine = describe_machine("benchmarks.training_steps")
    methods = list(dict.fromkeys(method or CONTENDERS))
    if unknown := set(methods) - CONTENDERS.keys():
        raise ValueError(f"unknown method {min(unknown)!r}; choose one of {', '.join(CONTENDERS)}")
    kind = dtype or ("bfloat16" if device.startswith("cuda") else "float32")  # as the pipelines' configurations do
    if kind not in TOLERANCE:
        raise ValueError(f"unknown dtype {kind!r}; choose one of {', '.join(TOLERANCE)}")
    if shapes is not None and shapes not in SHAPES:
        raise ValueError(f"unknown shapes {shapes!r}; choose one of {', '.join(SHAPES)}")
    jobs = [
        Job(
            backbone=backbone, shapes=shapes, device=device, threads=threads or num_cores(),
            heads=HeadsConfig(num_heads=num_heads, num_layers=num_layers),
            train=TrainSection.model_validate({"method": name, "dtype": kind, "seed": seed, "warmup_steps": 0}),
        )
        for name in methods
    ]  # fmt: skip
    count, vocab_size = (1 + repeats), jobs[0].vocab_size
    known = (
        read_rows(data, vocab_size=vocab_size) if data else random_rows(rows * count, vocab_size=vocab_size, seed=seed)
    )
    batches = draw_batches(known, rows_of_step=rows, num_batches=count, seed=seed)
    figures: dict[str, object] = {}
    grids: list[Grid] = []
    for job in jobs:
        found = figures_of(job.train.method, run_in_turns(job, batches), batches)
        figures[job.train.method] = found
        grids += (shown := grids_of(job.train.method, found))
        for grid in shown:
            grid.show(console)
    if save_results:
        where = torch.device(device).type
        page = save(
            output, f"training-steps-{kind}-{where}-{datetime.now(UTC):%Y%m%d-%H%M}",
            title=f"Training steps beside plain loops, {kind}", machine=machine,
            settings=_settings(jobs[0], batches, data) | {"repeats": repeats}, grids=grids, figures=figures,
        )  # fmt: skip
        console.print(f"saved {page}")


def _settings(job: Job, batches: Sequence[Batch], data: Path | None) -> dict[str, object]:
    train = job.train
    lengths = "prompts of {} to {} tokens, answers of {} to {}".format(*PROMPT_LENGTHS, *ANSWER_LENGTHS)
    wanted = ("chunk_size", "sequence_length", "lr_heads", "lr_backbone", "lora_rank", "lora_dropout", "lambda0")
    return {
        "backbone": job.shapes or Path(job.backbone).name, "dtype": train.dtype, "device": job.device,
        "threads": job.threads, "num_heads": job.heads.num_heads, "num_layers": job.heads.num_layers,
        "rows": f"{len(batches[0])} a step ({data.name if data else 'random, uniform: ' + lengths})",
        "tokens_of_steps": [sum(map(length_of, batch)) for batch in batches[1:]],
        "padding of the naive batches": f"{padding_share(batches[1:]):.0%}",
    } | {name: getattr(train, name) for name in wanted}  # fmt: skip


if __name__ == "__main__":
    run_command(main)
