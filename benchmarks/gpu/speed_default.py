"""`python -m benchmarks.gpu.speed_default`: a model's trees beside its own plain decoding, at several batch sizes, greedily.

Both replay CUDA graphs where there is a GPU. Each repeat runs every contender within the same minute, in an order that
rotates, and ratios are taken inside one repeat, of whole runs and of their decode steps alone: reading prompts is the same for
all, and on a GPU the host launches it kernel by kernel. "adaptive" chooses its nodes, of the first tree, by step times that are
measured first.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated

import typer

import medusa
from benchmarks.command import RESULTS, choose_trees, console, describe, run_command
from benchmarks.comparison import Spread
from benchmarks.machine import describe_machine
from benchmarks.prompts import built_in, read_prompts
from benchmarks.report import Grid, save
from medusa.backbone import dtype_name
from medusa.config import SamplingParams
from medusa.dynamic_tree import DynamicTree
from medusa.engine import Engine, Request, StepRecord
from medusa.generate import Model
from medusa.provision import DEFAULT_BACKBONE
from medusa.tree import Tree
from medusa.tree_policy import fit_policy

PLAIN, ADAPTIVE = "plain", "adaptive"
BATCHES = (1, 16, 64)
ROUNDS = 2  # prompts for each slot, so that batches stay full while answers end


@dataclass(frozen=True, kw_only=True)
class Run:
    """All prompts answered once by one contender."""

    tokens_per_s: float
    step_tokens_per_s: float  # while decode steps ran
    answers: dict[str, list[int]]
    acceleration_rate: float


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An engine and what it tells of its forwards."""

    engine: Engine
    told: list[StepRecord]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One contender at one batch size: its speed, the ratio to plain decoding, and how many answers are plain's."""

    tokens_per_s: float
    against_plain: Spread
    steps_against_plain: Spread
    acceleration_rate: float
    num_identical: int
    num_answers: int


def answer_all(contender: Contender, prompts: Sequence[list[int]], *, max_tokens: int) -> Run:
    """From the first prompt to the last token. ValueError where nothing is decoded."""
    params = SamplingParams(max_tokens=max_tokens)
    requests = [Request(prompt_ids=ids, params=params, request_id=str(n)) for n, ids in enumerate(prompts)]
    contender.told.clear()
    began = time.perf_counter()
    done = list(contender.engine.run(requests))
    seconds = time.perf_counter() - began
    tokens = sum(len(one.token_ids) for one in done)
    decoded = [step for step in contender.told if step.phase == "decode"]
    if not decoded:
        raise ValueError(
            "every answer ended with its first token, so there are no steps to compare; give other prompts"
        )
    steps = sum(one.stats.num_steps for one in done)
    return Run(
        tokens_per_s=tokens / seconds,
        step_tokens_per_s=sum(step.tokens for step in decoded) / sum(step.seconds for step in decoded),
        answers={one.request_id: one.token_ids for one in done},
        acceleration_rate=(tokens - len(done)) / max(steps, 1),
    )


def engines(
    model: Model, trees: Sequence[Tree | DynamicTree], *, batch: int, context_length: int, policy_s: float, graphs: bool
) -> dict[str, Contender]:
    """Plain first; "adaptive" where it is known how often the heads are right."""

    def make(tree: Tree | DynamicTree | None) -> Contender:
        told: list[StepRecord] = []
        engine = Engine(
            model.backbone, model.heads if tree else None, tree=tree, max_batch_size=batch,
            context_length=context_length, graphs=graphs, on_step=told.append,
        )  # fmt: skip
        return Contender(engine=engine, told=told)

    made = {PLAIN: make(None), **{str(tree): make(tree) for tree in trees}}
    if model.checkpoint is not None and model.checkpoint.accuracy is not None:
        made[ADAPTIVE] = make(trees[0])
        engine = made[ADAPTIVE].engine
        engine.policy = fit_policy(engine.decoder, model.checkpoint.accuracy, budget_s=policy_s)
    return made


def compare(
    made: Mapping[str, Contender], prompts: Sequence[list[int]], *, max_tokens: int, repeats: int
) -> dict[str, list[Run]]:
    """Every contender `repeats` times; before that once, which records the graphs."""
    names = list(made)
    for name in names:
        answer_all(made[name], prompts, max_tokens=max_tokens)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for repeat in range(repeats):
        turn = repeat % len(names)
        for name in (*names[turn:], *names[:turn]):
            runs[name].append(answer_all(made[name], prompts, max_tokens=max_tokens))
    return runs


def figures_of(runs: Mapping[str, Sequence[Run]]) -> dict[str, Figures]:
    plain = runs[PLAIN]
    return {
        name: Figures(
            tokens_per_s=Spread.of([run.tokens_per_s for run in own]).median,
            against_plain=Spread.of(
                [mine.tokens_per_s / one.tokens_per_s for mine, one in zip(own, plain, strict=True)]
            ),
            steps_against_plain=Spread.of(
                [mine.step_tokens_per_s / one.step_tokens_per_s for mine, one in zip(own, plain, strict=True)]
            ),
            acceleration_rate=own[0].acceleration_rate,
            num_identical=sum(own[0].answers[key] == answer for key, answer in plain[0].answers.items()),
            num_answers=len(plain[0].answers),
        )
        for name, own in runs.items()
    }


def grid(batch: int, figures: Mapping[str, Figures]) -> Grid:
    rows = [
        [name, *(f"{ratio:.2f}" for ratio in (own.against_plain.min, own.against_plain.median, own.against_plain.max)),
         f"{own.steps_against_plain.median:.2f}",
         f"{own.acceleration_rate:.2f}", f"{own.tokens_per_s:.0f}", f"{own.num_identical} of {own.num_answers}"]
        for name, own in figures.items()
    ]  # fmt: skip
    columns = ("", "/ plain, min", "median", "max", "of steps alone", "tokens a step", "tokens/s", "same answers")
    return Grid(title=f"{batch} sequences", columns=columns, rows=rows)


def main(
    backbone: Annotated[str, typer.Option(help="built-in name or model folder")] = DEFAULT_BACKBONE,
    heads: Annotated[str, typer.Option(help="'default', 'plain', 'medusa2' or a heads folder")] = "default",
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    dtype: Annotated[str, typer.Option()] = "auto",
    kernel: Annotated[str | None, typer.Option(help="torch, triton or fused; the model's own choice without")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="repeat it; 1, 16, 64 without")] = None,
    tree: Annotated[
        list[str] | None, typer.Option(help="nodes or dynamic:N; repeat it; the heads' own without")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL of messages, turns or prompt; built-in without")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="take the first N prompts")] = None,
    max_tokens: Annotated[int, typer.Option(min=2)] = 256,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    policy_s: Annotated[float, typer.Option(help="seconds to measure step times in, for the adaptive tree")] = 10.0,
    graphs: Annotated[bool, typer.Option("--graphs/--eager", help="CUDA graphs, or kernel by kernel")] = True,
    output: Annotated[Path, typer.Option(help="folder of the .md and .json")] = RESULTS,
) -> None:
    """Measure trees against plain decoding."""
    machine = describe_machine("benchmarks.gpu.speed_default")
    rows = read_prompts(prompts, limit=limit) if prompts else built_in()[:limit]
    model = medusa.load(backbone, heads=heads, device=device, dtype=dtype, gpu_kernels=kernel)  # type: ignore[arg-type]
    trees = choose_trees(model, tree or [])
    encoded = [model.encode(list(row.messages)) for row in rows]
    room = min(max(map(len, encoded)) + max_tokens, model.backbone.max_context)
    figures: dict[int, dict[str, Figures]] = {}
    for size in batch or BATCHES:
        made = engines(model, trees, batch=size, context_length=room, policy_s=policy_s, graphs=graphs)
        asked = encoded if size == 1 else list(islice(cycle(encoded), ROUNDS * size))
        figures[size] = figures_of(compare(made, asked, max_tokens=max_tokens, repeats=repeats))
        grid(size, figures[size]).show(console)
    kind = dtype_name(model.backbone.weight_dtype)
    settings = describe(backbone, kind, rows, prompts) | {
        "max_tokens": max_tokens, "repeats": repeats,
        "kernels": model.backbone.fused.gpu_kernels if model.backbone.fused else "generic",
        "graphs": graphs and model.backbone.device.type == "cuda",
    }  # fmt: skip
    page = save(
        output, f"gpu-speed-{kind}-{model.backbone.device.type}-{datetime.now(UTC):%Y%m%d-%H%M}",
        title=f"Tree and plain decoding, {kind}", machine=machine, settings=settings,
        grids=[grid(size, own) for size, own in figures.items()],
        figures={str(size): {name: asdict(one) for name, one in own.items()} for size, own in figures.items()},
    )  # fmt: skip
    console.print(f"\nwritten to {page.name}", highlight=False)


if __name__ == "__main__":
    run_command(main)
