"""Which prompts a chunk reads: in order of arrival, within the budget, nobody overtaken."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from medusa.config import SamplingParams
from medusa.decoder import CHUNK_BUCKETS, chunk_size
from medusa.prefix_cache import BLOCK
from medusa.request import Request
from medusa.schedule import MAX_PREFILL_ROWS, Schedule
from medusa.sequence import Sequence


def sequence(prompt: list[int], name: str = "0") -> Sequence:
    return Sequence(
        request=Request(prompt_ids=prompt, params=SamplingParams(max_tokens=1), request_id=name), submitted=0.0
    )


def schedule(*prompts: list[int], slots: int = 8) -> Schedule:
    made = Schedule(slots)
    made.waiting.extend(sequence(prompt, str(i)) for i, prompt in enumerate(prompts))
    return made


def lengths(chosen: list[Sequence]) -> list[int]:
    return [len(s.prompt_ids) for s in chosen]


@settings(max_examples=200, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 300), min_size=1, max_size=12),
    slots=st.integers(1, 6),
    budget=st.sampled_from(CHUNK_BUCKETS[:6]),
)
def test_all_are_read_in_order_each_chunk_within_the_budget(prompts: list[int], slots: int, budget: int) -> None:
    made = schedule(*([1] * n for n in prompts), slots=slots)
    order: list[str] = []
    while made.can_read:
        chunk = made.next_prompts(budget, None)
        assert chunk and len(chunk) <= min(MAX_PREFILL_ROWS, slots - len(made.running))
        left = [len(s.prompt_ids) - s.num_read for s in chunk]
        parts = [min(n, budget) for n in left]
        assert chunk_size(max(parts)) * len(chunk) <= budget
        assert len(chunk) == 1 or parts == left, "several prompts are read to their ends"
        if parts[0] < left[0]:
            chunk[0].num_read += parts[0]
            made.begin_half(chunk[0])
        else:
            made.begin(chunk)
            order += [s.request_id for s in chunk]
            assert made.half_read is None
        assert made.num_taken <= slots
        if len(made.running) == slots:
            made.running.clear()
    assert order == [str(i) for i in range(len(prompts))]


def test_short_prompts_go_together_and_a_long_one_alone() -> None:
    made = schedule([1] * 5, [2] * 8, [3] * 100, [4] * 3)
    assert lengths(made.next_prompts(64, None)) == [5, 8]
    made.begin(made.next_prompts(64, None))
    assert lengths(made.next_prompts(64, None)) == [100]
    made.next_prompts(64, None)[0].num_read = 64
    made.begin_half(made.waiting[0])
    assert made.num_taken == 3 and "2" in made and "3" in made
    assert lengths(made.next_prompts(128, None)) == [100, 3], "its rest and the next are one chunk"


def test_what_is_known_needs_no_room() -> None:
    made = schedule([1] * 100, [2] * 100)
    assert len(made.next_prompts(64, lambda s: 96)) == 2
    assert len(made.next_prompts(64, lambda s: 0)) == 1


def test_prompts_that_begin_alike_wait_until_their_beginning_is_known() -> None:
    system = [7] * (2 * BLOCK)
    made = schedule([*system, 1], [*system, 2], [*system, 3])
    assert lengths(made.next_prompts(256, None)) == [33, 33, 33], "without a prefix cache waiting is no use"
    first = made.next_prompts(256, lambda s: 0)
    assert len(first) == 1
    made.begin(first)
    assert len(made.next_prompts(256, lambda s: 2 * BLOCK)) == 2


def test_equal_prompts_wait_once() -> None:
    prompt = [7] * (2 * BLOCK)
    made = schedule(prompt, prompt, prompt)
    made.begin(made.next_prompts(256, lambda s: 0))
    assert len(made.next_prompts(256, lambda s: BLOCK)) == 2, (
        "the last token is read anyway, so its block is never taken"
    )
