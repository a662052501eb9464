"""The arithmetic of ratios, on answers whose times are known."""

from __future__ import annotations

import pytest

from benchmarks.comparison import Agreement, Spread, agreement, compare
from benchmarks.contenders import Answer


def answer(tokens: str, wall_s: float, num_steps: int = 0, step_s: float = 0.0) -> Answer:
    return Answer(token_ids=tuple(map(ord, tokens)), wall_s=wall_s, step_s=(step_s,) * num_steps)


def test_ratios_are_taken_inside_a_repeat() -> None:
    """The second repeat runs ten times slower for all contenders alike; no ratio notices."""
    repeats = [
        {
            "generate": [answer("abcde", 8 * slow)],
            "plain": [answer("abcde", 4 * slow, num_steps=4, step_s=1.0 * slow)],
            "tree": [answer("abcde", 2 * slow, num_steps=2, step_s=1.5 * slow)],
        }
        for slow in (1.0, 10.0)
    ]
    found = compare(repeats, generate="generate", plain="plain", trees=["tree"])
    assert found.plain_against_generate == Spread(min=2, median=2, max=2)
    assert found.trees["tree"].speedup == Spread(min=2, median=2, max=2)
    assert found.trees["tree"].against_generate.median == 4
    assert found.trees["tree"].overhead == Spread(min=1.5, median=1.5, max=1.5)
    assert found.trees["tree"].acceleration_rate == 2  # five tokens, the first from the prefill, in two steps
    assert found.tokens_per_s["plain"].max == 10 * found.tokens_per_s["plain"].min


def test_acceleration_rate_weighs_answers_by_their_steps() -> None:
    long, short = answer("a" * 9, 1.0, num_steps=8, step_s=1.0), answer("abc", 1.0, num_steps=1, step_s=1.0)
    repeat = {"generate": [long, short], "plain": [long, short], "tree": [long, short]}
    found = compare([repeat], generate="generate", plain="plain", trees=["tree"])
    assert found.trees["tree"].acceleration_rate == pytest.approx((8 + 2) / (8 + 1))


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
    assert agreement([answer(t, 1.0) for t in ours], [answer(t, 1.0) for t in theirs]) == expected
