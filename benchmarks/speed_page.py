"""A speed run's figures as tables: ratios first, since absolute speed says more about the machine. Measures nothing."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.comparison import Agreement, Comparison, Spread, StepAgreement
from benchmarks.contenders import PLAIN
from benchmarks.report import Grid
from benchmarks.roofline import Roofline

SPREAD = ("min", "median", "max")


def speed_grids(comparison: Comparison, batch: int) -> list[Grid]:
    """The tables of one batch size."""
    group = _group(batch)
    return [
        ratio_grid(comparison, batch),
        Grid(
            title=f"Acceleration rate{group}",
            columns=("", "tokens per step"),
            rows=[[name, f"{rate:.2f}"] for name, rate in comparison.acceleration_rates.items()],
        ),
        Grid(
            title=f"Tokens per second, prefill included{group}",
            columns=("", *SPREAD),
            rows=[[name, *_cells(spread, digits=1)] for name, spread in comparison.tokens_per_s.items()],
        ),
        agreement_grid(comparison, batch),
    ]


def ratio_grid(comparison: Comparison, batch: int) -> Grid:
    return Grid(title=f"Ratios{_group(batch)}", columns=("", *SPREAD), rows=_ratios(comparison))


def agreement_grid(comparison: Comparison, batch: int) -> Grid:
    return Grid(
        title=f"Same tokens{_group(batch)}",
        columns=("", "identical answers", "first difference"),
        rows=[[f"{name} and {PLAIN}", *_agreement_cells(a)] for name, a in comparison.agreements.items()],
    )


def throughput_grid(comparisons: Mapping[int, Comparison]) -> Grid:
    """Batch size → who wrote how fast there. Whoever tells no steps drafts nothing: a token a step."""
    return Grid(
        title="Generated tokens per second, prefill included",
        columns=("", "batch", *SPREAD, "tokens per step"),
        rows=[
            [name, str(batch), *_cells(spread, digits=1), f"{one.acceleration_rates.get(name, 1):.2f}"]
            for batch, one in comparisons.items()
            for name, spread in one.tokens_per_s.items()
        ],
    )


def roofline_grid(rooflines: Mapping[int, Roofline]) -> Grid:
    """Batch size → what its plain step reads, beside what it takes."""
    return Grid(
        title="Roofline of the plain step",
        columns=("sequences", "weights, MB", "cache, MB", "memory, GB/s", "at least, ms", "measured, ms", "share"),
        rows=[
            [
                str(batch), f"{one.weight_bytes / 1e6:.0f}", f"{one.cache_bytes / 1e6:.1f}", f"{one.bandwidth / 1e9:.1f}",
                f"{1e3 * one.limit_s:.1f}", f"{1e3 * one.step_s:.1f}", f"{one.share:.0%}",
            ]
            for batch, one in rooflines.items()
        ],
    )  # fmt: skip


def chain_grid(ours: str, theirs: str, agreements: Mapping[int, StepAgreement]) -> Grid:
    """Batch size → verify steps of the same chain in two engines, where their answers are the same."""
    return Grid(
        title="The same chain of best guesses: verify steps where the answers are identical",
        columns=("sequences", "turns with identical answers", ours, theirs),
        rows=[[str(b), str(one.num_turns), str(one.steps), str(one.their_steps)] for b, one in agreements.items()],
    )


def _group(batch: int) -> str:
    return "" if batch == 1 else f", {batch} sequences"


def _ratios(comparison: Comparison) -> list[list[str]]:
    rows = []
    for ours, others in comparison.speedups.items():
        if PLAIN in others:
            rows.append([f"{ours} / {PLAIN} (speedup)", *_cells(others[PLAIN])])
        rows += [[f"{ours} / {other}", *_cells(spread)] for other, spread in others.items() if other != PLAIN]
        if ours in comparison.overheads:
            rows.append([f"{ours} step / {PLAIN} step (overhead)", *_cells(comparison.overheads[ours])])
    return rows


def _cells(spread: Spread, digits: int = 2) -> list[str]:
    return [f"{value:.{digits}f}" for value in (spread.min, spread.median, spread.max)]


def _agreement_cells(agreement: Agreement) -> list[str]:
    place = agreement.first_difference
    return [
        f"{agreement.num_identical} of {agreement.num_prompts}",
        "none" if place is None else f"at token {place + 1}",
    ]
