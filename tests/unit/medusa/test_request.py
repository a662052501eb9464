"""Statistics of an answer follow from its steps."""

from __future__ import annotations

from medusa.request import Stats


def test_draft_counts_and_histogram_follow_from_the_steps() -> None:
    stats = Stats(tokens_per_step=[1, 3, 1, 2, 3], nodes_per_step=[0, 8, 1, 4, 8])
    assert (stats.num_tokens, stats.num_steps, stats.acceleration_rate) == (10, 4, 9 / 4)
    assert stats.num_draft_tokens == 7 + 0 + 3 + 7
    assert stats.num_accepted_tokens == 2 + 0 + 1 + 2
    assert stats.acceptance_histogram == (1, 1, 2)
    assert sum(stats.acceptance_histogram) == stats.num_steps


def test_an_answer_of_the_prefill_alone_has_no_drafts() -> None:
    stats = Stats(tokens_per_step=[1], nodes_per_step=[0])
    assert stats.acceptance_histogram == () and stats.num_draft_tokens == stats.num_accepted_tokens == 0
