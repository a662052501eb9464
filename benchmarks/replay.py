"""`python -m benchmarks.replay`: acceleration rates of many trees and sets of heads, from one plain decoding of the prompts.

Greedy answers do not depend on the tree, so each tree's steps are counted by replaying them (`medusa.replay`; a test holds
it to the engine's own count). With `--calibration` it also grows a tree for each set of heads, and fits their temperatures,
on answers to those prompts, which must not be those of the measurement; `--keep` writes the heads with both. Counts steps;
times nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import medusa
from benchmarks.acceptance import answer_all
from benchmarks.command import RESULTS, console, describe, labelled, run_command
from benchmarks.machine import describe_machine, num_cores
from benchmarks.prompts import Prompt, built_in, read_prompts
from benchmarks.report import Grid, save
from medusa.backbone import dtype_name
from medusa.checkpoint import load_checkpoint, save_checkpoint
from medusa.confidence import fit_temperatures
from medusa.config import SamplingParams
from medusa.dynamic_tree import DynamicTree
from medusa.generate import Model
from medusa.provision import DEFAULT_BACKBONE
from medusa.replay import accepted_lengths, guessed_ranks, num_steps, steps_through
from medusa.tree import Tree
from medusa.tree_search import MAX_RANKS, HitTable, grow_paths

MAX_NODES = 64
STORED, GROWN = "stored tree", "grown anew"


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A prompt's ids and those of the backbone's plain answer."""

    category: str
    prompt_ids: list[int]
    answer_ids: list[int]


def answered(model: Model, prompts: Sequence[Prompt], *, max_tokens: int, batch: int) -> list[Answered]:
    """Answer the prompts plainly, if there are any. Answers of one token have no step and are left out."""
    if not prompts:
        return []
    params = SamplingParams(max_tokens=max_tokens)
    done = answer_all(model, Tree.root_only(), prompts, params=params, max_batch_size=batch)
    kept = [prompt for prompt in prompts if done[prompt.id].error is None and len(done[prompt.id].token_ids) > 1]
    return [
        Answered(category=p.category, prompt_ids=model.encode(list(p.messages)), answer_ids=done[p.id].token_ids)
        for p in kept
    ]


def pairs_of(answers: Sequence[Answered]) -> list[tuple[list[int], list[int]]]:
    return [(one.prompt_ids, one.answer_ids) for one in answers]


def ranks_in(model: Model, answers: Sequence[Answered]) -> list[Tensor]:
    """Of each answer, the ranks [P,K] at which the heads guessed it."""
    assert model.heads is not None
    return list(guessed_ranks(model.backbone, model.heads, pairs_of(answers)))


def steps_of(
    model: Model, answers: Sequence[Answered], ranks: Sequence[Tensor], trees: Mapping[str, Tree | DynamicTree]
) -> dict[str, list[int]]:
    """Of each tree, the verify steps of each answer. The ranks serve every static one; dynamic ones are proposed at each
    position."""
    assert model.heads is not None
    found = {name: [num_steps(own, tree) for own in ranks] for name, tree in trees.items() if isinstance(tree, Tree)}
    dynamic = {name: tree for name, tree in trees.items() if isinstance(tree, DynamicTree)}
    if dynamic:
        accepted = list(accepted_lengths(model.backbone, model.heads, list(dynamic.values()), pairs_of(answers)))
        found |= {name: [steps_through(one[i]) for one in accepted] for i, name in enumerate(dynamic)}
    return found


def rates(answers: Sequence[Answered], counts: Sequence[int]) -> dict[str, float]:
    """Acceleration rate by category and over `all`, from the answers' steps."""
    steps = [(a.category, len(a.answer_ids) - 1, count) for a, count in zip(answers, counts, strict=True)]
    categories = dict.fromkeys([*(category for category, _, _ in steps), "all"])
    chosen = {name: [row for row in steps if name in (row[0], "all")] for name in categories}
    return {name: sum(row[1] for row in rows) / sum(row[2] for row in rows) for name, rows in chosen.items()}


def hits_of(answers: Sequence[Tensor]) -> HitTable:
    """How often the heads were right on answers, from their ranks [P,K]."""
    hits = torch.stack([torch.cat(list(answers)) == rank for rank in range(MAX_RANKS)], dim=2)
    # Head k has no target at the last k − 1 positions of an answer.
    counts = torch.tensor([sum(max(len(ranks) - k, 0) for ranks in answers) for k in range(hits.shape[1])])
    return HitTable(hits=hits.sum(dim=0), counts=counts)


def calibrated(model: Model, answers: Sequence[Answered]) -> Model:
    """The same heads with the tree and the temperatures that these answers give."""
    assert model.heads is not None and model.checkpoint is not None
    accuracy = hits_of(ranks_in(model, answers)).accuracy
    checkpoint = replace(
        model.checkpoint,
        paths=grow_paths(accuracy, MAX_NODES),
        accuracy=accuracy.tolist(),
        temperatures=fit_temperatures(model.backbone, model.heads, pairs_of(answers)),
    )
    return Model(model.backbone, model.heads, checkpoint)


def keep(model: Model, folder: Path) -> None:
    """The heads of a calibrated model, as they are stored, with its tree and temperatures; their card says so."""
    assert model.checkpoint is not None and model.checkpoint.folder is not None
    old, new = load_checkpoint(model.checkpoint.folder), model.checkpoint
    told = f"Grown from answers to calibration prompts: `python -m benchmarks.replay`, {datetime.now(UTC).date()}."
    save_checkpoint(
        folder, old.heads, paths=new.paths, backbone_name=old.backbone_name, backbone_fingerprint=old.backbone_fingerprint,
        default_nodes=old.default_nodes and min(old.default_nodes, len(new.paths) + 1), accuracy=new.accuracy,
        temperatures=new.temperatures, adapters=old.adapters, card=old.card | {"Tree": told}, dtype=old.dtype,
    )  # fmt: skip


def main(
    prompts: Annotated[Path | None, typer.Option(help="JSONL of messages, turns or prompt; built-in without")] = None,
    calibration: Annotated[Path | None, typer.Option(help="JSONL of other prompts, to grow trees from")] = None,
    backbone: Annotated[str, typer.Option(help="built-in name, model folder or hub id")] = DEFAULT_BACKBONE,
    heads: Annotated[
        list[str] | None, typer.Option(help="'default', 'plain', 'medusa2' or a heads folder; repeat it")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 makes the count exact")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda; chosen by itself without")] = None,
    threads: Annotated[int, typer.Option(help="torch threads; 0: one for each core")] = 0,
    tree: Annotated[
        list[str] | None, typer.Option(help="nodes of the trees, or dynamic:N; repeat it (default: 16, 64)")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2)] = 96,
    batch: Annotated[int, typer.Option(min=1, help="prompts decoded together")] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="take the first N prompts")] = None,
    calibration_limit: Annotated[int | None, typer.Option(min=1)] = 160,
    kept: Annotated[Path | None, typer.Option("--keep", help="folder for the last heads with the tree grown")] = None,
    output: Annotated[Path, typer.Option(help="folder of the .md and .json")] = RESULTS,
) -> None:
    """Compare trees and sets of heads on a prompts file."""
    if kept is not None and calibration is None:
        raise ValueError("--keep stores a tree grown from --calibration; give both")
    torch.set_num_threads(threads or num_cores())
    machine = describe_machine("benchmarks.replay")
    rows = read_prompts(prompts, limit=limit) if prompts else built_in()[:limit]
    others = read_prompts(calibration, limit=calibration_limit) if calibration else []
    found: dict[str, dict[str, float]] = {}
    known: dict[str, list[list[Answered]]] = {}
    for label, name in labelled(heads or ["default"]).items():
        model = medusa.load(backbone, heads=name, dtype=dtype, device=device)
        assert model.checkpoint is not None
        tuned = "" if model.checkpoint.adapters is None else name  # the original answers for all heads that are its own
        if tuned not in known:
            known[tuned] = [answered(model, some, max_tokens=max_tokens, batch=batch) for some in (rows, others)]
        answers, elsewhere = known[tuned]
        ranks, models = ranks_in(model, answers), {STORED: model}
        if others:
            models[GROWN] = calibrated(model, elsewhere)
        shapes = {
            f"{label}, {how}, {size}": one.resolve_tree(size)
            for (how, one), size in product(models.items(), tree or ("16", "64"))
        }
        steps = steps_of(model, answers, ranks, shapes)
        found |= {name: rates(answers, steps[name]) for name in shapes}
        if kept is not None:
            keep(models[GROWN], kept)
    categories = list(dict.fromkeys([*(row.category for row in rows), "all"]))
    table = Grid(
        title="Acceleration rate, greedy, replayed",
        columns=("heads, tree, nodes", *categories),
        rows=[[name, *(f"{by[one]:.2f}" if one in by else "–" for one in categories)] for name, by in found.items()],
    )
    table.show(console)
    kind = dtype_name(model.backbone.weight_dtype)
    settings = describe(backbone, kind, rows, prompts) | {"max_tokens": max_tokens, "calibration prompts": len(others)}
    stem = f"replay-{kind}-{model.backbone.device.type}-{datetime.now(UTC):%Y%m%d-%H%M}"
    title = f"Acceleration rate by replay, {kind}"
    page = save(output, stem, title=title, machine=machine, settings=settings, grids=[table], figures={"rates": found})
    console.print(f"saved {page}")


if __name__ == "__main__":
    run_command(main)
