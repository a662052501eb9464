"""`python -m benchmarks.quality`: what a backbone's answers lose in a smaller type, or by a set of heads that tunes it.

Each contender reads the float32 original's greedy answers, and text that people wrote, by the arithmetic that decodes, and
answers the prompts itself. Counts tokens; times nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import medusa
from benchmarks.acceptance import answer_all
from benchmarks.command import RESULTS, console, describe, labelled, run_command
from benchmarks.machine import describe_machine, num_cores
from benchmarks.prompts import Prompt, built_in, read_prompts
from benchmarks.report import Grid, save
from medusa.config import SamplingParams
from medusa.generate import Model
from medusa.provision import DEFAULT_BACKBONE
from medusa.tree import Tree
from pipelines.quality import compare_backbones, heldout_paragraphs
from pipelines.report import Quality

Answers = Mapping[str, Sequence[int]]  # prompt's id → the answer's token ids


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Greedy answers beside the original's: how many are equal, and the mean share of each that comes before the first
    token that differs."""

    num_answers: int
    equal: int
    shared_prefix: float


def agreement(ours: Answers, theirs: Answers) -> Agreement:
    """Over the prompts that the original answered."""
    shares = [
        sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours[name], wanted, strict=False))) / len(wanted)
        for name, wanted in theirs.items()
    ]
    equal = sum(list(ours[name]) == list(wanted) for name, wanted in theirs.items())
    return Agreement(num_answers=len(shares), equal=equal, shared_prefix=sum(shares) / len(shares))


def answers_of(model: Model, prompts: Sequence[Prompt], *, max_tokens: int, batch: int) -> Answers:
    """Plain greedy answers; none for a prompt that was refused."""
    params = SamplingParams(max_tokens=max_tokens)
    done = answer_all(model, Tree.root_only(), prompts, params=params, max_batch_size=batch)
    return {name: one.token_ids for name, one in done.items() if one.error is None and one.token_ids}


def line(name: str, quality: Quality, agreed: Agreement) -> list[str]:
    told = [(part.tuned_perplexity, part.rise, part.mean_kl) for part in (quality.answers, quality.text)]
    cells = [cell for ppl, rise, kl in told for cell in (f"{ppl:.4f}", f"{rise:+.2%}", f"{kl:.5f}")]
    return [name, *cells, f"{agreed.equal} of {agreed.num_answers}", f"{agreed.shared_prefix:.0%}"]


def main(
    prompts: Annotated[Path | None, typer.Option(help="JSONL of messages, turns or prompt; built-in without")] = None,
    backbone: Annotated[str, typer.Option(help="built-in name, model folder or hub id")] = DEFAULT_BACKBONE,
    dtype: Annotated[
        list[str] | None, typer.Option(help="types of weights to compare; repeat it (default: bfloat16, int8)")
    ] = None,
    heads: Annotated[list[str] | None, typer.Option(help="heads folder with adapters, in float32; repeat it")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda; chosen by itself without")] = None,
    threads: Annotated[int, typer.Option(help="torch threads; 0: one for each core")] = 0,
    text: Annotated[Path | None, typer.Option(help="a paragraph a line; built-in without")] = None,
    max_tokens: Annotated[int, typer.Option(min=2)] = 128,
    batch: Annotated[int, typer.Option(min=1, help="prompts decoded together")] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="take the first N prompts")] = None,
    output: Annotated[Path, typer.Option(help="folder of the .md and .json")] = RESULTS,
) -> None:
    """Compare a backbone in other types, or tuned, with itself in float32."""
    torch.set_num_threads(threads or num_cores())
    machine = describe_machine("benchmarks.quality")
    rows = read_prompts(prompts, limit=limit) if prompts else built_in()[:limit]
    original = medusa.load(backbone, heads=None, dtype="float32", device=device)
    wanted = answers_of(original, rows, max_tokens=max_tokens, batch=batch)
    if not wanted:
        raise ValueError("the original answered none of the prompts; give shorter ones")
    asked = {row.id: original.encode(list(row.messages)) for row in rows}
    paragraphs = [original.backbone.tokenizer(part)["input_ids"] for part in heldout_paragraphs(text)]
    chosen: dict[str, tuple[str | None, str]] = {
        name: (None, name) for name in dict.fromkeys(dtype or ["bfloat16", "int8"])
    }
    chosen |= {label: (folder, "float32") for label, folder in labelled(heads or []).items()}
    lines: list[list[str]] = []
    figures: dict[str, Any] = {}
    for name, (folder, kind) in chosen.items():
        model = medusa.load(backbone, heads=folder, dtype=kind, device=device)
        quality = compare_backbones(
            model.backbone,
            original.backbone,
            answers=[(asked[prompt], said) for prompt, said in wanted.items()],
            texts=paragraphs,
        )
        agreed = agreement(answers_of(model, rows, max_tokens=max_tokens, batch=batch), wanted)
        lines.append(line(name, quality, agreed))
        figures[name] = asdict(quality) | {"agreement": asdict(agreed)}
    first = figures[next(iter(figures))]
    table = Grid(
        title=f"Beside float32: perplexity {first['answers']['original_perplexity']:.4f} on its greedy answers, "
        f"{first['text']['original_perplexity']:.4f} on people's text",
        columns=(
            "backbone", "answers: perplexity", "rise", "mean KL", "text: perplexity", "rise", "mean KL",
            "equal greedy answers", "equal up to",
        ),
        rows=lines,
    )  # fmt: skip
    table.show(console)
    stem = f"quality-{original.backbone.device.type}-{datetime.now(UTC):%Y%m%d-%H%M}"
    settings = describe(backbone, "float32", rows, prompts) | {"max_tokens": max_tokens, "paragraphs": len(paragraphs)}
    page = save(
        output, stem, title="Quality beside float32", machine=machine, settings=settings, grids=[table], figures=figures
    )  # fmt: skip
    console.print(f"saved {page}")


if __name__ == "__main__":
    run_command(main)
