"""`python -m benchmarks.distillation`: generated tokens per second by batch size, plain, with heads, and beside vLLM.

The tree is of one size, or follows the load ("adaptive": by step times measured before its first pass). Every contender
writes the same number of tokens for the same rows (the end of sequence counts, and is passed over), prefill included, as an
actor of `pipelines.distill` does: no more rows at once than the batch, and the batch kept full while there are rows. One
batch size follows the other; within one, each repeat runs every contender once, and who begins rotates.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer

import medusa
from benchmarks.command import RESULTS, console, describe, run_command
from benchmarks.comparison import Comparison, compare
from benchmarks.contenders import PLAIN, OurEngine
from benchmarks.interleaved import run_interleaved
from benchmarks.machine import describe_machine, num_cores
from benchmarks.our_engines import ADAPTIVE, our_engines
from benchmarks.peers.engines import Environments, parse_options, peer_launches, weights_folder
from benchmarks.peers.process import started
from benchmarks.prompts import Prompt, read_prompts
from benchmarks.report import machine_lines, save
from benchmarks.speed_page import agreement_grid, ratio_grid, throughput_grid
from medusa.backbone import dtype_name
from medusa.engine import Engine
from medusa.generate import Model
from medusa.provision import DEFAULT_BACKBONE
from pipelines.prompts import builtin_prompts


def make_rows(prompts: Sequence[Prompt], num_rows: int) -> list[Prompt]:
    """The prompts over and over, until there are enough rows."""
    return [prompts[i % len(prompts)] for i in range(num_rows)]


def choose_engines(model: Model, trees: Sequence[str], *, batch: int, context_length: int) -> list[OurEngine]:
    """Plain, and one for each tree; without any, plain alone."""
    if trees:
        return our_engines(model, trees, max_batch_size=batch, context_length=context_length)
    return [OurEngine(Engine(model.backbone, max_batch_size=batch, context_length=context_length), name=PLAIN)]


def main(
    prompts: Annotated[Path | None, typer.Option(help="JSONL of messages, turns or prompt; built-in without")] = None,
    backbone: Annotated[str, typer.Option(help="built-in name, model folder or hub id")] = DEFAULT_BACKBONE,
    heads: Annotated[
        str, typer.Option(help="'default', a heads folder, or 'none' for plain decoding alone")
    ] = "default",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32, int8")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda; chosen by itself without")] = None,
    threads: Annotated[int, typer.Option(help="threads of every engine; 0: one for each core")] = 0,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="rows decoded together; repeat it to compare")] = None,
    tree: Annotated[
        list[int] | None, typer.Option(min=1, help="nodes, beside plain; repeat it to compare; 1 is plain alone")
    ] = None,
    follow_load: Annotated[bool, typer.Option("--adaptive", help="also a tree that follows the load")] = False,
    vllm: Annotated[
        Path | None,
        typer.Option(exists=True, help="python of vLLM's environment: peers/install_vllm.sh; it also gets the heads"),
    ] = None,
    vllm_options: Annotated[str, typer.Option(help="further arguments of vLLM's LLM, a JSON object")] = "{}",
    max_tokens: Annotated[int, typer.Option(min=2, help="new tokens of every row")] = 192,
    rows: Annotated[int, typer.Option(min=1, help="rows of a pass; the prompts over and over")] = 64,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    output: Annotated[Path, typer.Option(help="folder of the .md and .json")] = RESULTS,
    save_results: Annotated[bool, typer.Option("--save/--no-save")] = True,
) -> None:
    """Measure how many tokens per second self-distillation writes."""
    torch.set_num_threads(num_threads := threads or num_cores())
    machine = describe_machine("benchmarks.distillation")
    environments = Environments(vllm=vllm, vllm_options=parse_options(vllm_options))
    asked = read_prompts(prompts) if prompts else _built_in()
    model = medusa.load(backbone, heads=None if heads == "none" else heads, dtype=dtype, device=device)
    encoded = [model.encode(list(row.messages)) for row in make_rows(asked, rows)]
    room = max(map(len, encoded)) + max_tokens
    sizes = tree or ([1] if model.heads is None else [4, model.tree.num_nodes])
    trees = [str(nodes) for nodes in sizes if nodes > 1] + ([ADAPTIVE] if follow_load else [])
    comparisons: dict[int, Comparison] = {}
    versions: dict[str, None] = {}
    with tempfile.TemporaryDirectory(prefix="medusa-bench-") as work:
        source = weights_folder(model, backbone, Path(work)) if vllm else backbone
        for size in dict.fromkeys(batch or [8, 16, 32, 64]):
            ours = choose_engines(model, trees, batch=size, context_length=room)
            folder = Path(work) / f"batch-{size}"
            folder.mkdir()
            launches = peer_launches(
                environments,
                model,
                source=source,
                workdir=folder,
                context_length=room,
                max_batch_size=size,
                num_threads=num_threads,
            )
            with started(launches, folder=folder) as peers:
                passes = run_interleaved([*ours, *peers], [encoded], num_tokens=max_tokens, num_repeats=repeats)
            comparisons[size] = compare(passes, plain=PLAIN, trees=[one.name for one in ours[1:]])
            versions |= dict.fromkeys(peer.version for peer in peers)

    tables = [throughput_grid(comparisons)]
    for size, comparison in comparisons.items():
        tables += [grid for grid in (ratio_grid(comparison, size), agreement_grid(comparison, size)) if grid.rows]
    for line in machine_lines(machine):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for table in tables:
        table.show(console)
    if save_results:
        kind = dtype_name(model.backbone.weight_dtype)
        settings = describe(backbone, kind, asked, prompts)
        settings |= {"rows": rows, "max_tokens": max_tokens, "repeats": repeats}
        settings |= {"beside": ", ".join(versions)} if versions else {}
        figures: dict[str, object] = {f"batch {size}": one.as_dict() for size, one in comparisons.items()}
        stem = f"distillation-{kind}-{model.backbone.device.type}-{datetime.now(UTC):%Y%m%d-%H%M}"
        title = f"Distillation throughput, {kind}"
        page = save(output, stem, title=title, machine=machine, settings=settings, grids=tables, figures=figures)
        console.print(f"saved {page}")


def _built_in() -> list[Prompt]:
    """What `distill` answers where no prompts are given."""
    return [
        Prompt(id=p.id, category=p.source, messages=({"role": "user", "content": p.turns[0]},))
        for p in builtin_prompts("train")
    ]


if __name__ == "__main__":
    run_command(main)
