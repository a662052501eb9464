"""The choice of nodes on made-up curves; the measuring on a made-up clock and on a real decoder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medusa.config import SamplingParams
from medusa.decoder import Decoder
from medusa.sampling import SamplingRows
from medusa.tree import Tree
from medusa.tree_policy import (
    Gain,
    StepCosts,
    TreePolicy,
    expected_by_size,
    fit_policy,
    measure_step_costs,
    tree_sizes,
)
from tests.unit.medusa.tiny import random_heads, tiny_backbone

EXPECTED = {1: 1.0, 2: 1.4, 4: 1.7, 8: 1.9, 16: 2.1}


def costs(of: dict[int, dict[int, float]]) -> StepCosts:
    return StepCosts(seconds=of)


def compute_bound(overhead: float, *batches: int) -> StepCosts:
    """Seconds = overhead + rows computed: a device that is idle up to `overhead` rows."""
    return costs({b: {n: overhead + b * n for n in EXPECTED} for b in batches})


def test_trees_shrink_with_the_batch_down_to_plain_decoding() -> None:
    policy = TreePolicy(expected=EXPECTED, costs=compute_bound(60, 1, 2, 4, 8, 16, 32, 64, 128))
    chosen = [policy.choose(batch) for batch in (1, 2, 4, 8, 16, 32, 64, 128)]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] == 8 and chosen[-1] == 1 and len(set(chosen)) >= 3


@given(
    st.dictionaries(
        st.sampled_from([1, 2, 4, 8]),
        st.fixed_dictionaries({n: st.floats(0.01, 10) for n in EXPECTED}),
        min_size=1,
    ),
    st.integers(1, 12),
    st.floats(0, 2),
)
def test_the_choice_is_never_slower_than_plain_and_never_slower_than_another_that_beats_the_margin(
    table: dict[int, dict[int, float]], batch: int, gain: float
) -> None:
    policy = TreePolicy(expected=EXPECTED, costs=costs(table), margin=0.03)
    rate = {n: (1 + gain * (EXPECTED[n] - 1)) / policy.costs.at(batch, n) for n in EXPECTED}
    chosen = policy.choose(batch, gain)
    assert rate[chosen] >= rate[1]
    assert chosen == 1 or rate[chosen] > 1.03 * rate[1]
    assert chosen > 1 or max(rate.values()) <= 1.03 * rate[1]
    assert chosen == 1 or rate[chosen] == max(rate.values())


def test_a_promise_within_the_noise_is_not_taken() -> None:
    table = costs({1: {1: 1.0, 2: 1.38}})
    expected = {1: 1.0, 2: 1.4}
    assert TreePolicy(expected=expected, costs=table).choose(1) == 1
    assert TreePolicy(expected=expected, costs=table, margin=0.0).choose(1) == 2


def test_costs_between_measured_batches_lie_on_the_line_and_outside_are_the_nearest() -> None:
    table = costs({2: {1: 1.0, 4: 3.0}, 6: {1: 2.0}})
    assert [table.at(b, 1) for b in (1, 2, 3, 5, 6, 9)] == [1.0, 1.0, 1.25, 1.75, 2.0, 2.0]
    assert costs({2: {1: 1.0}, 6: {1: 2.0}}).at(3, 4) == float("inf")
    assert table.at(2, 4) == 3.0 and table.at(3, 4) == table.at(6, 4) == float("inf"), "too dear to be measured"


def test_a_tree_that_gives_less_than_expected_gives_way_and_is_tried_again() -> None:
    policy, gain = TreePolicy(expected=EXPECTED, costs=compute_bound(60, 1)), Gain()
    assert policy.choose(1, gain.value) == 8
    for _ in range(400):
        gain.see(expected=EXPECTED[8], emitted=[1])
    assert gain.value < 0.01 and policy.choose(1, gain.value) == 1
    plain_steps = 0
    while policy.choose(1, gain.value) == 1 and plain_steps < 2000:
        gain.see(expected=1.0, emitted=[1])
        plain_steps += 1
    assert 50 < plain_steps < 2000, "neither at once nor never"
    for _ in range(400):
        gain.see(expected=EXPECTED[8], emitted=[3, 3])
    assert gain.value == pytest.approx(2 / 0.9, rel=0.01)


def test_expected_tokens_are_those_of_the_first_nodes() -> None:
    tree = Tree.grown([(0,), (0, 0), (1,), (0, 1), (1, 0)])
    accuracy = [[0.5, 0.2], [0.4, 0.1]]
    expected = expected_by_size(accuracy, tree)
    assert tuple(expected) == tree_sizes(tree) == (1, 2, 4, 6)
    assert expected == pytest.approx({1: 1, 2: 1.5, 4: 1.5 + 0.2 + 0.2, 6: 1.9 + 0.05 + 0.08})


BACKBONE = tiny_backbone(seed=3, dtype=torch.float64)
TREE = Tree.full([4, 2])


def decoder_of(slots: int) -> Decoder:
    return Decoder(BACKBONE, random_heads(BACKBONE), TREE, num_slots=slots, context_length=96)


def test_every_size_and_batch_is_timed_and_the_least_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, now, slow = decoder_of(3), [0.0], iter([5.0] * 24)

    def step(num_rows: int, rows: SamplingRows, *, nodes: int) -> None:
        assert [decoder.length_of(slot) for slot in range(num_rows)] == [95] * num_rows
        now[0] += 1 + num_rows * nodes / 100 + next(slow, 0.0)

    monkeypatch.setattr(decoder, "step", step)
    expected = {1: 1.0, 4: 2.0, 13: 3.0}
    measured = measure_step_costs(decoder, expected, budget_s=170, clock=lambda: now[0])
    assert now[0] >= 170
    want = {b: {n: pytest.approx(1 + b * n / 100) for n in expected} for b in (1, 2, 3)}
    assert {b: dict(row) for b, row in measured.seconds.items()} == want


def test_a_size_that_cannot_pay_is_not_timed_for_larger_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, now = decoder_of(4), [0.0]
    seen: set[tuple[int, int]] = set()

    def step(num_rows: int, rows: SamplingRows, *, nodes: int) -> None:
        seen.add((num_rows, nodes))
        now[0] += num_rows * nodes  # no tree ever pays

    monkeypatch.setattr(decoder, "step", step)
    measured = measure_step_costs(decoder, {1: 1.0, 4: 1.5}, budget_s=0, clock=lambda: now[0])
    assert seen == {(1, 1), (1, 4), (2, 1), (4, 1)}
    assert TreePolicy(expected={1: 1.0, 4: 1.5}, costs=measured).choose(4) == 1


def test_measuring_leaves_the_decoder_as_it_was() -> None:
    prompts, rows = [[1, 2, 3], [4] * 9], SamplingRows.of([SamplingParams()] * 2, BACKBONE.device)

    def decode(decoder: Decoder) -> Iterator[list]:
        yield decoder.prefill(0, prompts, rows).tokens
        for _ in range(6):
            yield decoder.step(2, rows).tokens

    used = decoder_of(2)
    policy = fit_policy(used, [[0.4, 0.2, 0.1, 0.1], [0.3, 0.1, 0, 0], [0.1, 0, 0, 0]], budget_s=0.0)
    assert sorted(policy.costs.seconds) == [1, 2] and tuple(policy.expected) == (1, 2, 4, 8, 13)
    assert all(policy.choose(batch) in policy.expected for batch in (1, 2, 3))
    assert list(decode(used)) == list(decode(decoder_of(2)))


@pytest.mark.parametrize("bad", [{}, {1: {2: 1.0}}, {1: {1: 0.0}}, {1: {1: float("nan")}}])
def test_costs_that_are_none_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="step costs"):
        StepCosts(seconds=bad)


def test_a_policy_needs_plain_decoding_among_its_sizes() -> None:
    with pytest.raises(ValueError, match="1 node gives 1 token"):
        TreePolicy(expected={2: 1.4}, costs=costs({1: {1: 1.0}}))
