"""`python -m benchmarks.distillation`: generated tokens per second of one engine by batch size, plain and with heads.

The tree is of one size, or follows the load ("adaptive": by step times measured before its first pass). Every contender
writes the same number of tokens for the same rows (the end of sequence is ignored), prefill included, as an actor of
`pipelines.distill` does. Each repeat runs every contender once, and who begins rotates.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track

import medusa
from benchmarks.command import RESULTS, console, describe, dtype_name, run_command
from benchmarks.comparison import Spread
from benchmarks.machine import describe_machine, num_cores
from benchmarks.prompts import Prompt, read_prompts
from benchmarks.report import Grid, machine_lines, save
from medusa.config import SamplingParams
from medusa.engine import Engine, Request
from medusa.generate import Model
from medusa.provision import DEFAULT_BACKBONE
from medusa.tree import Tree
from medusa.tree_policy import TreePolicy, fit_policy
from pipelines.prompts import builtin_prompts

WARM_UP_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Contender:
    """So many sequences together, each step a tree of so many nodes; one node is plain decoding, None leaves the number
    to `policy`, up to the model's own tree."""

    batch: int
    nodes: int | None
    policy: TreePolicy | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        return {1: "plain", None: "adaptive"}.get(self.nodes, f"tree of {self.nodes}")


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What one pass over the rows gave."""

    num_tokens: int
    num_steps: int
    wall_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.wall_s


def make_rows(prompts: Sequence[Prompt], num_rows: int) -> list[Prompt]:
    """The prompts over and over, until there are enough rows."""
    return [prompts[i % len(prompts)] for i in range(num_rows)]


def run_once(model: Model, contender: Contender, rows: Sequence[list[int]], *, num_tokens: int) -> Throughput:
    """Answer every row with `num_tokens` tokens, the batch kept full while there are rows."""
    plain = contender.nodes == 1
    engine = Engine(
        model.backbone, None if plain else model.heads, tree=Tree.root_only() if plain else model.resolve_tree(contender.nodes),
        max_batch_size=contender.batch, context_length=max(map(len, rows)) + num_tokens, policy=contender.policy,
    )  # fmt: skip
    list(engine.run(_requests(rows[: contender.batch], WARM_UP_TOKENS)))
    engine.step_seconds.clear()
    began = time.perf_counter()
    done = list(engine.run(_requests(rows, num_tokens)))
    wall_s = time.perf_counter() - began
    assert all(completion.error is None for completion in done), "the context was made to fit"
    steps = sum(completion.stats.num_steps for completion in done)
    return Throughput(num_tokens=sum(len(c.token_ids) for c in done), num_steps=steps, wall_s=wall_s)


def _requests(rows: Sequence[list[int]], num_tokens: int) -> list[Request]:
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    return [Request(prompt_ids=ids, params=params, request_id=str(i)) for i, ids in enumerate(rows)]


def adaptive(model: Model, batch: int) -> Contender:
    """The tree that follows the load, its step times measured now. ValueError for heads of unknown accuracy."""
    accuracy = model.checkpoint.accuracy if model.checkpoint else None
    if accuracy is None:
        raise ValueError("an adaptive tree needs the heads' accuracy; calibrate them, or leave --adaptive out")
    engine = Engine(model.backbone, model.heads, tree=model.tree, max_batch_size=batch)
    return Contender(batch=batch, nodes=None, policy=fit_policy(engine.decoder, accuracy))


def measure(
    model: Model, contenders: Sequence[Contender], rows: Sequence[list[int]], *, num_tokens: int, num_repeats: int
) -> dict[Contender, list[Throughput]]:
    """Every contender once in each repeat."""
    measured: dict[Contender, list[Throughput]] = {contender: [] for contender in contenders}
    passes = [
        contender for turn in range(num_repeats) for contender in (*contenders[turn:], *contenders[:turn])
    ]  # who begins rotates
    for contender in track(passes, description="passes", console=console, transient=True):
        gc.collect()
        measured[contender].append(run_once(model, contender, rows, num_tokens=num_tokens))
    return measured


def grid(measured: dict[Contender, list[Throughput]]) -> Grid:
    lines = []
    for contender, passes in measured.items():
        spread = Spread.of([one.tokens_per_s for one in passes])
        per_step = sum(p.num_tokens for p in passes) / sum(p.num_steps for p in passes)
        speeds = [f"{value:.1f}" for value in (spread.min, spread.median, spread.max)]
        lines.append([contender.name, str(contender.batch), *speeds, f"{per_step:.2f}"])
    columns = ("", "batch", "min", "median", "max", "tokens per row and step")
    return Grid(title="Generated tokens per second, prefill included", columns=columns, rows=lines)


def main(
    prompts: Annotated[Path | None, typer.Option(help="JSONL of messages, turns or prompt; built-in without")] = None,
    backbone: Annotated[str, typer.Option(help="built-in name, model folder or hub id")] = DEFAULT_BACKBONE,
    heads: Annotated[
        str, typer.Option(help="'default', a heads folder, or 'none' for plain decoding alone")
    ] = "default",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32, int8")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda; chosen by itself without")] = None,
    threads: Annotated[int, typer.Option(help="torch threads; 0: one for each core")] = 0,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="rows decoded together; repeat it to compare")] = None,
    tree: Annotated[list[int] | None, typer.Option(min=1, help="nodes; repeat it to compare; 1 is plain")] = None,
    follow_load: Annotated[bool, typer.Option("--adaptive", help="also a tree that follows the load")] = False,
    max_tokens: Annotated[int, typer.Option(min=2, help="new tokens of every row")] = 192,
    rows: Annotated[int, typer.Option(min=1, help="rows of a pass; the prompts over and over")] = 64,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    output: Annotated[Path, typer.Option(help="folder of the .md and .json")] = RESULTS,
    save_results: Annotated[bool, typer.Option("--save/--no-save")] = True,
) -> None:
    """Measure how many tokens per second self-distillation writes."""
    torch.set_num_threads(threads or num_cores())
    machine = describe_machine("benchmarks.distillation")
    asked = read_prompts(prompts) if prompts else _built_in()
    model = medusa.load(backbone, heads=None if heads == "none" else heads, dtype=dtype, device=device)
    encoded = [model.encode(list(row.messages)) for row in make_rows(asked, rows)]
    sizes = tree or ([1] if model.heads is None else [1, 4, model.tree.num_nodes])
    batches = list(dict.fromkeys(batch or [8, 16, 32, 64]))
    contenders = [Contender(batch=b, nodes=n) for n in dict.fromkeys(sizes) for b in batches]
    if follow_load:
        contenders += [adaptive(model, b) for b in batches]
    measured = measure(model, contenders, encoded, num_tokens=max_tokens, num_repeats=repeats)

    table = grid(measured)
    for line in machine_lines(machine):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    table.show(console)
    if save_results:
        kind = dtype_name(model)
        settings = describe(backbone, kind, asked, prompts)
        settings |= {"rows": rows, "max_tokens": max_tokens, "repeats": repeats}
        figures: dict[str, object] = {
            f"{c.name}, batch {c.batch}": [one.tokens_per_s for one in passes] for c, passes in measured.items()
        }
        stem = f"distillation-{kind}-{model.backbone.device.type}-{datetime.now(UTC):%Y%m%d-%H%M}"
        title = f"Distillation throughput, {kind}"
        page = save(output, stem, title=title, machine=machine, settings=settings, grids=[table], figures=figures)
        console.print(f"saved {page}")


def _built_in() -> list[Prompt]:
    """What `distill` answers where no prompts are given."""
    return [
        Prompt(id=p.id, category=p.source, messages=({"role": "user", "content": p.turns[0]},))
        for p in builtin_prompts("train")
    ]


if __name__ == "__main__":
    run_command(main)
