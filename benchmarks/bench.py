"""`python -m benchmarks.bench`: plain and tree decoding beside transformers' `generate`, in one interleaved run.

All contenders hold the same weights, answer the same prompts one at a time, greedily, to the same length. Each repeat
runs every contender on every prompt, in an order that rotates, so that drift and heat fall on all alike.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track

import medusa
from benchmarks.command import RESULTS, choose_trees, console, describe, dtype_name, run_command
from benchmarks.comparison import Agreement, Comparison, Repeat, Spread, compare
from benchmarks.contenders import Contender, OurEngine, TransformersGenerate
from benchmarks.machine import describe_machine, num_cores
from benchmarks.prompts import built_in, read_prompts
from benchmarks.report import Grid, machine_lines, save
from medusa.dynamic_tree import DynamicTree
from medusa.engine import Engine
from medusa.generate import Model
from medusa.provision import DEFAULT_BACKBONE, default_backbone
from medusa.tree import Tree

WARM_UP_TOKENS = 8
QUIET_LOAD = 0.5


def run_interleaved(
    contenders: Sequence[Contender], prompts: Sequence[list[int]], *, num_tokens: int, num_repeats: int
) -> list[Repeat]:
    """Every contender on every prompt, `num_repeats` times over; who begins rotates from prompt to prompt."""
    for contender in contenders:
        contender.answer(prompts[0], WARM_UP_TOKENS)
    repeats: list[Repeat] = []
    for _ in track(range(num_repeats), description="repeats", console=console, transient=True):
        repeat: Repeat = {contender.name: [] for contender in contenders}
        for index, prompt in enumerate(prompts):
            turn = (index + len(repeats)) % len(contenders)
            for contender in (*contenders[turn:], *contenders[:turn]):
                gc.collect()
                repeat[contender.name].append(contender.answer(prompt, num_tokens))
        repeats.append(repeat)
    return repeats


def grids(comparison: Comparison) -> list[Grid]:
    """The figures as tables: ratios first, since absolute speed says more about the machine."""
    ratios = [("plain / generate", comparison.plain_against_generate)]
    for name, figures in comparison.trees.items():
        ratios += [
            (f"{name} / plain (speedup)", figures.speedup),
            (f"{name} / generate", figures.against_generate),
            (f"{name} step / plain step (overhead)", figures.overhead),
        ]
    worth = [[name, f"{tree.acceleration_rate:.2f}"] for name, tree in comparison.trees.items()]
    agreements = [("plain and generate", comparison.plain_agrees_with_generate)]
    agreements += [(f"{name} and plain", tree.agrees_with_plain) for name, tree in comparison.trees.items()]
    return [
        Grid(title="Ratios", columns=("", "min", "median", "max"), rows=[[n, *_cells(s)] for n, s in ratios]),
        Grid(title="Acceleration rate", columns=("", "tokens per step"), rows=worth),
        Grid(
            title="Tokens per second, prefill included",
            columns=("", "min", "median", "max"),
            rows=[[name, *_cells(spread, digits=1)] for name, spread in comparison.tokens_per_s.items()],
        ),
        Grid(
            title="Same tokens",
            columns=("", "identical answers", "first difference"),
            rows=[[name, *_agreement_cells(agreement)] for name, agreement in agreements],
        ),
    ]


def _cells(spread: Spread, digits: int = 2) -> list[str]:
    return [f"{value:.{digits}f}" for value in (spread.min, spread.median, spread.max)]


def _agreement_cells(agreement: Agreement) -> list[str]:
    place = agreement.first_difference
    return [
        f"{agreement.num_identical} of {agreement.num_prompts}",
        "none" if place is None else f"at token {place + 1}",
    ]


def make_contenders(
    model: Model, source: str | Path, trees: Sequence[Tree | DynamicTree], *, context_length: int
) -> list[Contender]:
    """`generate`, plain, and one engine for each tree, in this order."""
    backbone = model.backbone
    engines = [("plain", Engine(backbone, max_batch_size=1, context_length=context_length))]
    for tree in trees:
        engine = Engine(backbone, model.heads, tree=tree, max_batch_size=1, context_length=context_length)
        engines.append((str(tree), engine))
    generate = TransformersGenerate(source, dtype=backbone.dtype, device=backbone.device)
    return [generate, *(OurEngine(engine, name=name) for name, engine in engines)]


def main(
    backbone: Annotated[str, typer.Option(help="built-in name, model folder or hub id")] = DEFAULT_BACKBONE,
    heads: Annotated[str, typer.Option(help="'default' or a heads folder")] = "default",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32, int8")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda; chosen by itself without")] = None,
    threads: Annotated[int, typer.Option(help="torch threads; 0: one for each core")] = 0,
    max_tokens: Annotated[int, typer.Option(min=2, help="length of every answer")] = 128,
    tree: Annotated[
        list[str] | None, typer.Option(help="nodes of the tree, or dynamic:N; repeat it to compare several")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    prompts: Annotated[Path | None, typer.Option(help="JSONL of messages, turns or prompt; built-in without")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="take the first N prompts")] = None,
    output: Annotated[Path, typer.Option(help="folder of the .md and .json")] = RESULTS,
    save_results: Annotated[bool, typer.Option("--save/--no-save")] = True,
) -> None:
    """Measure plain and tree decoding beside transformers' generate."""
    torch.set_num_threads(threads or num_cores())
    machine = describe_machine("benchmarks.bench")
    if machine.load_average > QUIET_LOAD:
        console.print(
            f"[yellow]load average is {machine.load_average}: other work is running, so expect wide spreads",
            soft_wrap=True,
        )
    rows = read_prompts(prompts, limit=limit) if prompts else built_in()[:limit]
    model = medusa.load(backbone, heads=heads, dtype=dtype, device=device)
    encoded = [model.encode(list(row.messages)) for row in rows]
    room = max(len(ids) for ids in encoded) + max_tokens
    source = default_backbone() if backbone == DEFAULT_BACKBONE else backbone
    contenders = make_contenders(model, source, choose_trees(model, tree or []), context_length=room)
    names = [contender.name for contender in contenders]
    measured = run_interleaved(contenders, encoded, num_tokens=max_tokens, num_repeats=repeats)
    comparison = compare(measured, generate=names[0], plain=names[1], trees=names[2:])

    tables = grids(comparison)
    for line in machine_lines(machine):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for table in tables:
        table.show(console)
    if save_results:
        kind = dtype_name(model)
        settings = describe(backbone, kind, rows, prompts) | {"max_tokens": max_tokens, "repeats": repeats, "batch": 1}
        stem = f"speed-{kind}-{model.backbone.device.type}-{datetime.now(UTC):%Y%m%d-%H%M}"
        page = save(
            output, stem, title=f"Speed, {kind}", machine=machine, settings=settings, grids=tables,
            figures=comparison.as_dict(),
        )  # fmt: skip
        console.print(f"saved {page}")


if __name__ == "__main__":
    run_command(main)
