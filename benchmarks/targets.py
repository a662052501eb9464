"""What the project set out to reach, beside what a run measured. Pure arithmetic over comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.comparison import Comparison, Spread
from benchmarks.contenders import GENERATE, PLAIN
from benchmarks.our_engines import INT8
from benchmarks.peers.engines import LLAMA, VLLM, VLLM_HEADS
from benchmarks.report import Grid

TREE = "tree"  # stands for the first of ours with heads
INT8_TREE = INT8 + TREE
NOT_MEASURED = "not measured"
EVERY_BATCH = (1, 4, 16, 32)


@dataclass(frozen=True, kw_only=True)
class Target:
    """`ours` / `other` in tokens per second; `aim` None where there is only a bar."""

    ours: str
    other: str
    at_least: float
    aim: float | None = None
    batches: tuple[int, ...] = (1,)


# For the default backbone in bfloat16, greedy, on 2 cores.
TARGETS = (
    Target(ours=PLAIN, other=GENERATE, at_least=2.0, aim=2.5),
    Target(ours=PLAIN, other=VLLM, at_least=1.0, aim=1.2),
    Target(ours=TREE, other=VLLM, at_least=1.8, aim=3.0),
    Target(ours=TREE, other=VLLM_HEADS, at_least=2.2, aim=3.5),
    Target(ours=TREE, other=LLAMA, at_least=0.8, aim=1.2),
    Target(ours=INT8_TREE, other=LLAMA, at_least=0.8, aim=1.2),
    Target(ours=PLAIN, other=VLLM, at_least=1.0, aim=1.2, batches=EVERY_BATCH[1:]),
    Target(ours=TREE, other=PLAIN, at_least=0.97, batches=EVERY_BATCH),
)


def measured(target: Target, batch: int, comparisons: Mapping[int, Comparison], tree: str) -> Spread | None:
    """The target's ratio at this batch size; None where one side was not in the run."""
    if batch not in comparisons:
        return None
    return comparisons[batch].speedups.get(_name(target.ours, tree), {}).get(target.other)


def _name(ours: str, tree: str) -> str:
    return {TREE: tree, INT8_TREE: INT8 + tree}.get(ours, ours)


def verdict(target: Target, spread: Spread) -> str:
    """By the median of the repeats."""
    if spread.median < target.at_least:
        return "no"
    return "yes, and the aim" if target.aim is not None and spread.median >= target.aim else "yes"


def target_grid(comparisons: Mapping[int, Comparison], *, tree: str) -> Grid:
    """All targets, each at each of its batch sizes; `tree` is the contender that "tree" stands for."""
    rows = []
    for target in TARGETS:
        name = f"{_name(target.ours, tree)} / {target.other}"
        for batch in target.batches:
            spread = measured(target, batch, comparisons, tree)
            cells = [NOT_MEASURED, "", "", ""] if spread is None else [
                f"{spread.median:.2f}", f"{spread.min:.2f}", f"{spread.max:.2f}", verdict(target, spread),
            ]  # fmt: skip
            rows.append(
                [name, str(batch), f"{target.at_least:.2f}", f"{target.aim:.2f}" if target.aim else "–", *cells]
            )
    return Grid(
        title="Targets (set for bfloat16, 2 cores, the default backbone)",
        columns=("ratio", "batch", "at least", "aim", "median", "min", "max", "holds"),
        rows=rows,
    )
