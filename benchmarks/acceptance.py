"""`python -m benchmarks.acceptance`: acceleration rate by tree size and prompt category. Counts steps; times nothing.

Steps and tokens do not depend on the machine's load, so this may run beside other work.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track

import medusa
from benchmarks.command import RESULTS, choose_trees, console, describe, run_command
from benchmarks.machine import describe_machine, num_cores
from benchmarks.prompts import Prompt, built_in, read_prompts
from benchmarks.report import Grid, save
from medusa.backbone import dtype_name
from medusa.config import SamplingParams
from medusa.dynamic_tree import DynamicTree
from medusa.engine import Completion, Engine, Request
from medusa.generate import Model
from medusa.provision import DEFAULT_BACKBONE
from medusa.tree import Tree


def answer_all(
    model: Model, tree: Tree | DynamicTree, prompts: Sequence[Prompt], *, params: SamplingParams, max_batch_size: int
) -> dict[str, Completion]:
    """Prompt's id → its completion. Every prompt is answered, whatever order they finish in."""
    encoded = {prompt.id: model.encode(list(prompt.messages)) for prompt in prompts}
    if len(encoded) < len(prompts):
        raise ValueError(f"{len(prompts) - len(encoded)} prompts repeat the id of another; give each its own")
    length = max(len(ids) for ids in encoded.values()) + params.max_tokens
    engine = Engine(
        model.backbone, model.heads, tree=tree, max_batch_size=max_batch_size,
        context_length=min(length, model.backbone.max_context),
    )  # fmt: skip
    requests = [Request(prompt_ids=ids, params=params, request_id=name) for name, ids in encoded.items()]
    done = track(engine.run(requests), description=str(tree), total=len(requests), console=console, transient=True)
    completions = {completion.request_id: completion for completion in done}
    for name, completion in completions.items():
        if completion.error is not None:
            console.print(f"prompt {name} was not answered: {completion.error}")
    return completions


def rates_by_category(prompts: Sequence[Prompt], completions: dict[str, Completion]) -> dict[str, float]:
    """Acceleration rate, (tokens − answers) / steps, over all answers of a category and over `all` of them."""
    groups: dict[str, list[Completion]] = defaultdict(list)
    for prompt in prompts:
        completion = completions[prompt.id]
        if completion.error is None and completion.stats.num_steps:
            for category in dict.fromkeys((prompt.category, "all")):
                groups[category].append(completion)
    return {
        category: sum(c.stats.num_tokens - 1 for c in group) / sum(c.stats.num_steps for c in group)
        for category, group in groups.items()
    }


def main(
    prompts: Annotated[Path | None, typer.Option(help="JSONL of messages, turns or prompt; built-in without")] = None,
    backbone: Annotated[str, typer.Option(help="built-in name, model folder or hub id")] = DEFAULT_BACKBONE,
    heads: Annotated[str, typer.Option(help="'default', 'plain', 'medusa2' or a heads folder")] = "default",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32, int8")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda; chosen by itself without")] = None,
    threads: Annotated[int, typer.Option(help="torch threads; 0: one for each core")] = 0,
    tree: Annotated[
        list[str] | None, typer.Option(help="nodes of the tree, or dynamic:N; repeat it to compare several")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2)] = 256,
    batch: Annotated[int, typer.Option(min=1, help="prompts decoded together")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="take the first N prompts")] = None,
    output: Annotated[Path, typer.Option(help="folder of the .md and .json")] = RESULTS,
    save_results: Annotated[bool, typer.Option("--save/--no-save")] = True,
) -> None:
    """Measure greedy decoding's acceleration rate on a prompts file."""
    torch.set_num_threads(threads or num_cores())
    machine = describe_machine("benchmarks.acceptance")
    rows = read_prompts(prompts, limit=limit) if prompts else built_in()[:limit]
    model = medusa.load(backbone, heads=heads, dtype=dtype, device=device)
    trees = choose_trees(model, tree or [])
    params = SamplingParams(max_tokens=max_tokens)
    rates = {
        str(t): rates_by_category(rows, answer_all(model, t, rows, params=params, max_batch_size=batch)) for t in trees
    }
    categories = list(dict.fromkeys([*(row.category for row in rows), "all"]))
    table = Grid(
        title="Acceleration rate, greedy",
        columns=("prompts", *rates),
        rows=[[name, *(f"{by[name]:.2f}" if name in by else "–" for by in rates.values())] for name in categories],
    )
    table.show(console)
    if save_results:
        kind = dtype_name(model.backbone.weight_dtype)
        settings = describe(backbone, kind, rows, prompts) | {"max_tokens": max_tokens, "batch": batch}
        stem = f"acceptance-{kind}-{model.backbone.device.type}-{datetime.now(UTC):%Y%m%d-%H%M}"
        figures: dict[str, object] = {"acceleration_rate": rates}
        title = f"Acceleration rate, {kind}"
        page = save(output, stem, title=title, machine=machine, settings=settings, grids=[table], figures=figures)
        console.print(f"saved {page}")


if __name__ == "__main__":
    run_command(main)
