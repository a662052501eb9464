"""From turns to ratios. Pure arithmetic over what was timed; knows no model and no clock.

Ratios are taken inside one repeat, where all contenders ran within the same minute, and only then summarised: what the
machine did meanwhile slows both sides of a ratio alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

from benchmarks.contenders import Turn

Repeat = dict[str, list[Turn]]  # contender's name → its turns, in the prompts' order


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
class StepAgreement:
    """Verify steps of two contenders with the same drafts, over the turns whose answers are identical: there they must be
    equal too."""

    num_turns: int
    steps: int
    their_steps: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All figures of a run at one batch size. Every key is a contender's name.

    `speedups[ours][other]` are ratios of tokens per second, for our plain and trees; a tree's others include plain.
    `overheads` are a tree's step over the plain step: speedup over plain ≈ acceleration rate / overhead, the prefill left
    out. `acceleration_rates` are of all that draft and tell their steps. `agreements` are with plain.
    """

    tokens_per_s: dict[str, Spread]
    speedups: dict[str, dict[str, Spread]]
    overheads: dict[str, Spread]
    acceleration_rates: dict[str, float]
    agreements: dict[str, Agreement]
    plain_step_s: float

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def compare(repeats: Sequence[Repeat], *, plain: str, trees: Sequence[str]) -> Comparison:
    """Every contender answered the same prompts at the same length in each repeat; who is not ours is an other."""
    first = repeats[0]
    others = [name for name in first if name != plain and name not in trees]
    return Comparison(
        tokens_per_s={name: Spread.of([tokens_per_s(r[name]) for r in repeats]) for name in first},
        speedups={
            ours: {other: speedup(repeats, ours, other) for other in (*others, *([plain] if ours != plain else []))}
            for ours in (plain, *trees)
        },
        overheads={
            name: Spread.of([median_step_s(r[name]) / median_step_s(r[plain]) for r in repeats]) for name in trees
        },
        acceleration_rates={
            name: rate
            for name in first
            if name != plain and (rate := acceleration_rate(first[name])) is not None
        },
        agreements={name: agreement(first[name], first[plain]) for name in first if name != plain},
        plain_step_s=median([median_step_s(r[plain]) for r in repeats]),
    )  # fmt: skip


def tokens_per_s(turns: Sequence[Turn]) -> float:
    return sum(len(ids) for turn in turns for ids in turn.token_ids) / sum(turn.wall_s for turn in turns)


def speedup(repeats: Sequence[Repeat], fast: str, slow: str) -> Spread:
    return Spread.of([tokens_per_s(r[fast]) / tokens_per_s(r[slow]) for r in repeats])


def median_step_s(turns: Sequence[Turn]) -> float:
    return median([step for turn in turns for step in turn.step_s])


def acceleration_rate(turns: Sequence[Turn]) -> float | None:
    """(tokens − 1) / verify steps over all answers, since each answer's first token came from its prefill; None where
    steps are not told."""
    steps = [turn.num_steps for turn in turns]
    told = [count for count in steps if count is not None]
    if len(told) < len(steps) or not sum(told):
        return None
    return sum(len(ids) - 1 for turn in turns for ids in turn.token_ids) / sum(told)


def agreement(ours: Sequence[Turn], theirs: Sequence[Turn]) -> Agreement:
    pairs = [(a, b) for one, other in zip(ours, theirs, strict=True) for a, b in _answers(one, other)]
    parted = [_first_difference(a, b) for a, b in pairs]
    differences = [place for place in parted if place is not None]
    return Agreement(
        num_identical=len(parted) - len(differences),
        num_prompts=len(parted),
        first_difference=min(differences, default=None),
    )


def step_agreement(ours: Sequence[Turn], theirs: Sequence[Turn]) -> StepAgreement:
    """Both must tell their steps."""
    same = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.token_ids == b.token_ids]
    return StepAgreement(
        num_turns=len(same),
        steps=sum(a.num_steps or 0 for a, _ in same),
        their_steps=sum(b.num_steps or 0 for _, b in same),
    )


def _answers(one: Turn, other: Turn) -> zip[tuple[tuple[int, ...], tuple[int, ...]]]:
    return zip(one.token_ids, other.token_ids, strict=True)


def _first_difference(ours: tuple[int, ...], theirs: tuple[int, ...]) -> int | None:
    pairs = zip(ours, theirs, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    return None if place == len(ours) == len(theirs) else place
