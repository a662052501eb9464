"""The arithmetic of ratios, on answers whose times are known."""

from __future__ import annotations

import pytest

from benchmarks.comparison import Agreement, Spread, StepAgreement, agreement, compare, step_agreement
from benchmarks.contenders import Turn


def turn(*answers: str, wall_s: float = 1.0, step_s: tuple[float, ...] = (), num_steps: int | None = None) -> Turn:
    return Turn(
        token_ids=tuple(tuple(map(ord, text)) for text in answers), wall_s=wall_s, step_s=step_s, num_steps=num_steps
    )


def test_ratios_are_taken_inside_a_repeat() -> None:
    """The second repeat runs ten times slower for all contenders alike; no ratio notices."""
    repeats = [
        {
            "generate": [turn("abcde", wall_s=8 * slow)],
            "plain": [turn("abcde", wall_s=4 * slow, step_s=(1.0 * slow,) * 4, num_steps=4)],
            "tree": [turn("abcde", wall_s=2 * slow, step_s=(1.5 * slow,) * 2, num_steps=2)],
        }
        for slow in (1.0, 10.0)
    ]
    found = compare(repeats, plain="plain", trees=["tree"])
    twice = Spread(min=2, median=2, max=2)
    assert found.speedups == {
        "plain": {"generate": twice},
        "tree": {"generate": Spread(min=4, median=4, max=4), "plain": twice},
    }
    assert found.overheads == {"tree": Spread(min=1.5, median=1.5, max=1.5)}
    assert found.acceleration_rates == {"tree": 2}, "five tokens, the first from the prefill, in two steps"
    assert found.tokens_per_s["plain"].max == 10 * found.tokens_per_s["plain"].min
    assert found.plain_step_s == 5.5


def test_a_batch_counts_every_answer_and_every_sequence_its_own_steps() -> None:
    """Two answers of 5 and 3 tokens in 4 seconds: 2 tokens/s; (4 + 2) tokens in 3 + 1 sequences' steps."""
    repeat = {
        "plain": [turn("abcde", "abc", wall_s=8, step_s=(2.0,) * 4, num_steps=6)],
        "vLLM with heads": [turn("abcde", "abc", wall_s=4, num_steps=4)],
        "vLLM": [turn("abcde", "abx", wall_s=2)],
    }
    found = compare([repeat], plain="plain", trees=[])
    assert {name: spread.median for name, spread in found.tokens_per_s.items()} == {
        "plain": 1, "vLLM with heads": 2, "vLLM": 4
    }  # fmt: skip
    assert found.acceleration_rates == {"vLLM with heads": 1.5}, "vLLM tells no steps"
    assert found.speedups["plain"]["vLLM"].median == 0.25
    assert found.agreements["vLLM"] == Agreement(num_identical=1, num_prompts=2, first_difference=2)


def test_acceleration_rate_weighs_answers_by_their_steps() -> None:
    long, short = turn("a" * 9, step_s=(1.0,) * 8, num_steps=8), turn("abc", step_s=(1.0,), num_steps=1)
    found = compare([{"plain": [long, short], "tree": [long, short]}], plain="plain", trees=["tree"])
    assert found.acceleration_rates["tree"] == pytest.approx((8 + 2) / (8 + 1))


def test_steps_are_compared_where_answers_are_the_same() -> None:
    ours = [turn("abc", num_steps=2), turn("abc", num_steps=1), turn("xyz", num_steps=9)]
    theirs = [turn("abc", num_steps=2), turn("abc", num_steps=2), turn("xyy", num_steps=1)]
    assert step_agreement(ours, theirs) == StepAgreement(num_turns=2, steps=3, their_steps=4)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (["abc", "xyz"], ["abc", "xyz"], Agreement(num_identical=2, num_prompts=2, first_difference=None)),
        (["abc", "xyz"], ["abd", "xyz"], Agreement(num_identical=1, num_prompts=2, first_difference=2)),
        (["abc", "xyz"], ["abd", "ayz"], Agreement(num_identical=0, num_prompts=2, first_difference=0)),
        (["ab"], ["abc"], Agreement(num_identical=0, num_prompts=1, first_difference=2)),
    ],
)
def test_agreement(ours: list[str], theirs: list[str], expected: Agreement) -> None:
    assert agreement([turn(text) for text in ours], [turn(text) for text in theirs]) == expected
    assert agreement([turn(*ours)], [turn(*theirs)]) == expected, "answered together or one by one"
