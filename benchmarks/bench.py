"""`python -m benchmarks.bench`: plain and tree decoding beside other engines, in one interleaved run.

All contenders hold the same weights and answer the same prompts, greedily, to the same length, so many together as
`--batch` says. Each repeat runs every contender on every prompt, in an order that rotates, so that drift and heat fall on
all alike. Other engines than transformers' `generate` are named by the Python of the environment that holds them.
"""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer

import medusa
from benchmarks.command import RESULTS, console, describe, labelled, run_command
from benchmarks.contenders import Contender, TransformersGenerate, load_reference
from benchmarks.interleaved import Section, measure_section
from benchmarks.machine import describe_machine, num_cores
from benchmarks.our_engines import CHAIN, INT8, OUR_CHAIN, our_engines
from benchmarks.peers.engines import VLLM_HEADS, Environments, parse_options, peer_launches, weights_folder
from benchmarks.peers.process import started
from benchmarks.prompts import built_in, read_prompts
from benchmarks.report import Grid, machine_lines, save
from benchmarks.roofline import read_bandwidth
from benchmarks.speed_page import chain_grid, roofline_grid, speed_grids
from benchmarks.targets import target_grid
from medusa.backbone import dtype_name
from medusa.checkpoint import load_checkpoint
from medusa.generate import Model
from medusa.pretrained import heads_folder
from medusa.provision import DEFAULT_BACKBONE

QUIET_LOAD = 0.5


def generators(model: Model, source: str, *, lookup: int) -> list[Contender]:
    """transformers' `generate`, and with prompt lookup where it is asked for: one model for both."""
    reference = load_reference(source, dtype=model.backbone.dtype, device=model.backbone.device)
    return [TransformersGenerate(reference, lookup=drafts) for drafts in ([0, lookup] if lookup else [0])]


def with_heads(model: Model, heads: str, backbone: str) -> Model:
    """The same model with another set: behind the same weights, unless one of the two sets has tuned them."""
    checkpoint = load_checkpoint(heads_folder(heads, model.backbone.name), backbone=model.backbone)
    if checkpoint.adapters is None and (model.checkpoint is None or model.checkpoint.adapters is None):
        return Model(model.backbone, checkpoint.heads, checkpoint)
    dtype = "int8" if model.backbone.fused is not None and model.backbone.fused.int8 else model.backbone.dtype
    return medusa.load(backbone, heads=heads, dtype=dtype, device=model.backbone.device)


def all_grids(sections: dict[int, Section], *, tree: str) -> list[Grid]:
    """Every table of the run; `tree` is ours with heads in the targets."""
    chains = {batch: section.chain for batch, section in sections.items() if section.chain is not None}
    return [
        *(grid for batch, section in sections.items() for grid in speed_grids(section.comparison, batch)),
        *([chain_grid(OUR_CHAIN, VLLM_HEADS, chains)] if chains else []),
        roofline_grid({batch: section.roofline for batch, section in sections.items()}),
        target_grid({batch: section.comparison for batch, section in sections.items()}, tree=tree),
    ]


def main(
    backbone: Annotated[str, typer.Option(help="built-in name, model folder or hub id")] = DEFAULT_BACKBONE,
    heads: Annotated[str, typer.Option(help="'default', 'plain', 'medusa2' or a heads folder")] = "default",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32, int8")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda; chosen by itself without")] = None,
    threads: Annotated[int, typer.Option(help="threads of every engine; 0: one for each core")] = 0,
    max_tokens: Annotated[int, typer.Option(min=2, help="length of every answer")] = 128,
    tree: Annotated[
        list[str] | None,
        typer.Option(
            help="nodes of the tree, dynamic:N, adaptive (by load) or chain; repeat it; targets take the first"
        ),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="also ours with int8 weights, plain and the first tree")] = False,
    also_heads: Annotated[
        list[str] | None,
        typer.Option(help="another set, with the first tree; repeat it. Of kind medusa, vLLM takes it"),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="sequences answered together; repeat it")] = None,
    rounds: Annotated[
        int,
        typer.Option(min=1, help="answers of each place of a batch, one behind the other, as a busy server has them"),
    ] = 1,
    prompt_lookup: Annotated[int, typer.Option(min=0, help="also generate with prompt lookup of so many tokens")] = 0,
    vllm: Annotated[
        Path | None, typer.Option(exists=True, help="python of vLLM's environment: peers/install_vllm.sh")
    ] = None,
    vllm_options: Annotated[str, typer.Option(help="further arguments of vLLM's LLM, a JSON object")] = "{}",
    llama: Annotated[
        Path | None, typer.Option(exists=True, help="python of llama.cpp's: peers/install_llama.sh")
    ] = None,
    gguf: Annotated[Path | None, typer.Option(help="what llama.cpp reads; the default backbone's Q4 without")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    prompts: Annotated[Path | None, typer.Option(help="JSONL of messages, turns or prompt; built-in without")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="take the first N prompts")] = None,
    output: Annotated[Path, typer.Option(help="folder of the .md and .json")] = RESULTS,
    save_results: Annotated[bool, typer.Option("--save/--no-save")] = True,
) -> None:
    """Measure plain and tree decoding beside transformers' generate and other engines."""
    torch.set_num_threads(num_threads := threads or num_cores())
    machine = describe_machine("benchmarks.bench")
    if machine.load_average > QUIET_LOAD:
        console.print(
            f"[yellow]load average is {machine.load_average}: other work is running, so expect wide spreads",
            soft_wrap=True,
        )
    batches = list(dict.fromkeys(batch or [1]))
    environments = Environments(vllm=vllm, vllm_options=parse_options(vllm_options), llama=llama, gguf=gguf)
    rows = read_prompts(prompts, limit=limit) if prompts else built_in()[:limit]
    model = medusa.load(backbone, heads=heads, dtype=dtype, device=device)
    if vllm and CHAIN in (tree or []) and model.heads is not None and model.heads.config.kind != "medusa":
        raise ValueError(
            "a chain beside vLLM is for heads that vLLM takes too; give --heads plain, or leave the chain out"
        )
    if vllm and rounds > 1 and sum(size > 1 for size in batches) > 1:
        raise ValueError(
            f"vLLM is started once, for {max(batches)} sequences, and --rounds {rounds} would fill them at every batch; "
            "give one --batch above 1 at a time"
        )
    rounded = medusa.load(backbone, heads=heads, dtype="int8", device=device) if int8 else None
    sets = {f"{label}: ": with_heads(model, name, backbone) for label, name in labelled(also_heads or []).items()}
    encoded = [model.encode(list(row.messages)) for row in rows]
    room = max(map(len, encoded)) + max_tokens
    sections: dict[int, Section] = {}
    with tempfile.TemporaryDirectory(prefix="medusa-bench-") as work:
        source = weights_folder(model, backbone, Path(work))
        launches = peer_launches(
            environments,
            model,
            source=source,
            workdir=Path(work),
            context_length=room,
            max_batch_size=max(batches),
            num_threads=num_threads,
            others=list(sets.values()),
        )
        with started(launches, folder=Path(work)) as peers:
            others = [*(generators(model, source, lookup=prompt_lookup) if 1 in batches else []), *peers]
            bandwidth = read_bandwidth(model.backbone.device)
            for size in batches:
                ours = our_engines(model, tree or [], max_batch_size=size, context_length=room)
                if rounded is not None:
                    ours += our_engines(rounded, (tree or [])[:1], max_batch_size=size, context_length=room, kind=INT8)
                for label, other in sets.items():
                    _, *trees = our_engines(
                        other, (tree or [])[:1], max_batch_size=size, context_length=room, kind=label
                    )
                    ours += trees
                sections[size] = measure_section(
                    ours,
                    others,
                    encoded,
                    num_rounds=rounds,
                    num_tokens=max_tokens,
                    num_repeats=repeats,
                    bandwidth=bandwidth,
                )
    versions = ", ".join(dict.fromkeys(peer.version for peer in peers))

    tables = all_grids(sections, tree=ours[1].name)
    for line in machine_lines(machine):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for table in tables:
        table.show(console)
    if save_results:
        kind = dtype_name(model.backbone.weight_dtype)
        settings = describe(backbone, kind, rows, prompts) | {"max_tokens": max_tokens, "repeats": repeats}
        settings |= {"batch": " and ".join(map(str, batches)), "rounds": rounds if max(batches) > 1 else 1}
        settings |= {"beside": versions} if versions else {}
        stem = f"speed-{kind}-{model.backbone.device.type}-{datetime.now(UTC):%Y%m%d-%H%M}"
        figures: dict[str, object] = {f"batch {size}": section.as_dict() for size, section in sections.items()}
        page = save(
            output, stem, title=f"Speed, {kind}", machine=machine, settings=settings, grids=tables, figures=figures
        )
        console.print(f"saved {page}")


if __name__ == "__main__":
    run_command(main)
