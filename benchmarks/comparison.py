"""From answers to ratios. Pure arithmetic over what was timed; knows no model and no clock.

Ratios are taken inside one repeat, where all contenders ran within the same minute, and only then summarised: what the
machine did meanwhile slows both sides of a ratio alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

from benchmarks.contenders import Answer

Repeat = dict[str, list[Answer]]  # contender's name → its answer to each prompt, in the prompts' order


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Lowest, middle and highest of the repeats."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(min=min(values), median=median(values), max=max(values))


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How two contenders' answers compare: identical prompts, and the first position at which any pair parts."""

    num_identical: int
    num_prompts: int
    first_difference: int | None


@dataclass(frozen=True, kw_only=True)
class TreeFigures:
    """What one tree is worth. Speedup ≈ acceleration rate / overhead, the prefill left out."""

    acceleration_rate: float
    overhead: Spread
    speedup: Spread
    against_generate: Spread
    agrees_with_plain: Agreement


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All figures of a run. Keys of `trees` are the contenders' names, of `tokens_per_s` too."""

    tokens_per_s: dict[str, Spread]
    plain_against_generate: Spread
    plain_agrees_with_generate: Agreement
    trees: dict[str, TreeFigures]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def compare(repeats: Sequence[Repeat], *, generate: str, plain: str, trees: Sequence[str]) -> Comparison:
    """Every contender answered the same prompts at the same length in each repeat; their names say which is which."""
    return Comparison(
        tokens_per_s={name: Spread.of([tokens_per_s(r[name]) for r in repeats]) for name in repeats[0]},
        plain_against_generate=speedup(repeats, plain, generate),
        plain_agrees_with_generate=agreement(repeats[0][plain], repeats[0][generate]),
        trees={
            name: TreeFigures(
                acceleration_rate=acceleration_rate(repeats[0][name]),
                overhead=Spread.of([median_step_s(r[name]) / median_step_s(r[plain]) for r in repeats]),
                speedup=speedup(repeats, name, plain),
                against_generate=speedup(repeats, name, generate),
                agrees_with_plain=agreement(repeats[0][name], repeats[0][plain]),
            )
            for name in trees
        },
    )


def tokens_per_s(answers: Sequence[Answer]) -> float:
    return sum(len(a.token_ids) for a in answers) / sum(a.wall_s for a in answers)


def speedup(repeats: Sequence[Repeat], fast: str, slow: str) -> Spread:
    return Spread.of([tokens_per_s(r[fast]) / tokens_per_s(r[slow]) for r in repeats])


def median_step_s(answers: Sequence[Answer]) -> float:
    return median([step for a in answers for step in a.step_s])


def acceleration_rate(answers: Sequence[Answer]) -> float:
    """(tokens − 1) / verify steps over all answers: each answer's first token came from its prefill."""
    return sum(len(a.token_ids) - 1 for a in answers) / sum(len(a.step_s) for a in answers)


def agreement(ours: Sequence[Answer], theirs: Sequence[Answer]) -> Agreement:
    parted = [_first_difference(a.token_ids, b.token_ids) for a, b in zip(ours, theirs, strict=True)]
    differences = [place for place in parted if place is not None]
    return Agreement(
        num_identical=len(parted) - len(differences),
        num_prompts=len(parted),
        first_difference=min(differences, default=None),
    )


def _first_difference(ours: tuple[int, ...], theirs: tuple[int, ...]) -> int | None:
    pairs = zip(ours, theirs, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    return None if place == len(ours) == len(theirs) else place
