"""A batch kept full changes no answer, meets lengths exactly, stops where it must, and loses nothing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa.config import SamplingParams
from medusa.engine import Completion, Engine, Request, StepRecord
from medusa.errors import PromptError
from medusa.tree import Tree
from tests.unit.medusa.tiny import random_heads, tiny_backbone

BACKBONE = tiny_backbone(seed=7, dtype=torch.float64, eos_token_id=11)
BACKBONE.model.generation_config.eos_token_id = 11
BACKBONE.tokenizer.eos_token = None
HEADS = random_heads(BACKBONE)
TREE = Tree.full([12, 4, 2])


def engine(tree: Tree = TREE, batch: int = 3, context: int = 96) -> Engine:
    return Engine(BACKBONE, HEADS, tree=tree, max_batch_size=batch, context_length=context)


def prompt_of(length: int, seed: int) -> list[int]:
    return torch.randint(0, 11, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def ask(i: int, length: int = 5, **params: object) -> Request:
    return Request(prompt_ids=prompt_of(length, i), params=SamplingParams(**params), request_id=str(i))  # type: ignore[arg-type]


def answers(requests: list[Request], made: Engine) -> dict[str, Completion]:
    return {done.request_id: done for done in made.run(requests)}


def test_the_eos_of_the_tiny_backbone_is_the_one_set() -> None:
    assert BACKBONE.eos_token_ids == {11}


@settings(max_examples=15, deadline=None)
@given(
    jobs=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 20), st.sampled_from([0.0, 1.0]), st.booleans()),
        min_size=1,
        max_size=8,
    ),
    batch=st.integers(1, 5),
)
def test_an_answer_does_not_depend_on_its_neighbours(jobs: list[tuple[int, int, float, bool]], batch: int) -> None:
    requests = [
        ask(i, n, max_tokens=m, temperature=t, acceptance="rejection", seed=i, ignore_eos=e)
        for i, (n, m, t, e) in enumerate(jobs)
    ]
    made = engine(batch=batch)
    together = answers(requests, made)
    assert not made.has_work and made.num_active == 0
    assert len(together) == len(jobs)
    for request in requests:
        alone = answers([request], engine(Tree.root_only(), batch=1))[request.request_id]
        assert together[request.request_id].token_ids == alone.token_ids
        assert together[request.request_id].finish_reason == alone.finish_reason


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7, 20])
def test_max_tokens_counts_tokens_and_is_met_exactly(max_tokens: int) -> None:
    done = answers([ask(0, max_tokens=max_tokens, ignore_eos=True)], engine())["0"]
    assert len(done.token_ids) == max_tokens and done.finish_reason == "length"
    assert done.stats.num_tokens == max_tokens
    assert sum(done.stats.tokens_per_step) == max_tokens and done.stats.tokens_per_step[0] == 1
    assert done.stats.num_steps < max_tokens or max_tokens == 1


def test_acceleration_rate_is_tokens_after_the_first_over_verify_steps() -> None:
    done = answers([ask(0, max_tokens=21, ignore_eos=True)], engine())["0"]
    assert done.stats.acceleration_rate == 20 / done.stats.num_steps > 1.5
    assert answers([ask(0, max_tokens=1)], engine())["0"].stats.acceleration_rate is None


def test_the_end_of_sequence_inside_a_path_cuts_there() -> None:
    found = 0
    for i in range(40):
        free = answers([ask(i, max_tokens=40, ignore_eos=True)], engine())[str(i)].token_ids
        if 11 not in free:
            continue
        cut = answers([ask(i, max_tokens=40)], engine())[str(i)]
        assert cut.token_ids == free[: free.index(11) + 1] and cut.finish_reason == "stop"
        assert cut.stats.num_tokens == len(cut.token_ids), "nothing after it is counted"
        found += 1
    assert found >= 3, "the test saw ends of sequence"


def test_a_root_that_ends_the_sequence_takes_no_further_step() -> None:
    for i in range(300):
        done = answers([ask(i, 3, max_tokens=30)], engine())[str(i)]
        if done.token_ids == [11]:
            assert done.stats.num_steps == 0 and done.finish_reason == "stop"
            return
    pytest.fail("no prompt in 300 begins its answer with the end of sequence")


def test_the_callers_stop_cuts_inside_a_path() -> None:
    free = answers([ask(0, max_tokens=30, ignore_eos=True)], engine())["0"].token_ids
    seen: list[int] = []

    def third(token: int) -> bool:
        seen.append(token)
        return len(seen) == 3

    request = Request(prompt_ids=prompt_of(5, 0), params=SamplingParams(max_tokens=30, ignore_eos=True), on_token=third)
    done = answers([request], engine())["0"]
    assert done.token_ids == seen == free[:3] and done.finish_reason == "stop"


@pytest.mark.parametrize("order", ["abc", "bca", "cab", "acb"])
def test_a_caller_may_cancel_another_in_the_step_in_which_a_third_ends(order: str) -> None:
    made, seen = engine(Tree.root_only()), []

    def cancels(token: int) -> bool:
        seen.append(token)
        if len(seen) == 3:
            assert made.cancel("b")
        return False

    lengths = {"a": 12, "b": 12, "c": 3}
    requests = [
        Request(
            prompt_ids=prompt_of(5, "abc".index(name)),
            params=SamplingParams(max_tokens=lengths[name], ignore_eos=True),
            request_id=name,
            on_token=cancels if name == "a" else None,
        )
        for name in order
    ]
    done = {completion.request_id: completion for completion in made.run(requests)}
    assert {name: len(one.token_ids) for name, one in done.items()} == {"a": 12, "c": 3}
    for one in done.values():
        alone = answers([ask("abc".index(one.request_id), max_tokens=12, ignore_eos=True)], engine(Tree.root_only()))
        assert one.token_ids == next(iter(alone.values())).token_ids[: len(one.token_ids)]


def test_who_ends_in_a_step_that_cancels_another_ends_once() -> None:
    """The cancelled one's slot goes to the last: here to a request that ends with its first token, below those just begun."""
    made = engine(Tree.root_only())
    for i in range(2):
        made.submit(ask(i, max_tokens=20, ignore_eos=True))
    made.step()
    made.submit(
        Request(
            prompt_ids=prompt_of(5, 2),
            params=SamplingParams(max_tokens=1, ignore_eos=True),
            request_id="short",
            on_token=lambda _: not made.cancel("0"),
        )
    )
    deltas = []
    while made.has_work:
        deltas += made.step()
    (short,) = [delta for delta in deltas if delta.request_id == "short"]
    assert short.completion is not None and len(short.completion.token_ids) == 1
    assert "0" not in {delta.request_id for delta in deltas}


@pytest.mark.parametrize("victim", ["0", "1", "2"])
def test_nothing_comes_of_a_request_that_was_cancelled_in_the_step(victim: str) -> None:
    """Before its turn in the step, after it, or by its own word."""
    made, seen = engine(TREE), []

    def cancels(token: int) -> bool:
        seen.append(token)
        return len(seen) == 3 and not made.cancel(victim)

    for i in range(3):
        made.submit(
            Request(
                prompt_ids=prompt_of(5, i),
                params=SamplingParams(max_tokens=12, ignore_eos=True),
                request_id=str(i),
                on_token=cancels if i == 1 else None,
            )
        )
    counts = Counter[str]()
    while made.has_work:
        for delta in made.step():
            assert not (delta.request_id == victim and len(seen) >= 3)
            counts[delta.request_id] += len(delta.token_ids)
    assert len(seen) == (3 if victim == "1" else 12)
    assert {name: count for name, count in counts.items() if name != victim} == dict.fromkeys(
        {"0", "1", "2"} - {victim}, 12
    )


def test_decoding_goes_to_the_very_end_of_the_context_and_not_beyond() -> None:
    for tree in (Tree.root_only(), TREE):
        made = engine(tree, context=32)
        done = answers([ask(0, 10, max_tokens=22, ignore_eos=True)], made)["0"]
        assert len(done.token_ids) == 22
    plain = answers([ask(0, 10, max_tokens=22, ignore_eos=True)], engine(Tree.root_only(), context=32))["0"]
    assert done.token_ids == plain.token_ids


def test_the_backbones_own_limit_is_reached_too() -> None:
    made = Engine(BACKBONE, HEADS, tree=TREE, max_batch_size=1, context_length=BACKBONE.max_context)
    room = BACKBONE.max_context - 250
    done = answers([ask(0, 250, max_tokens=room, ignore_eos=True)], made)["0"]
    plain = Engine(BACKBONE, None, max_batch_size=1, context_length=BACKBONE.max_context)
    assert done.token_ids == answers([ask(0, 250, max_tokens=room, ignore_eos=True)], plain)["0"].token_ids


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request(prompt_ids=[]), "empty"),
        (ask(0, 96, max_tokens=1), "96 tokens and the context 96"),
        (ask(0, 90, max_tokens=10), "ask for max_tokens 6 or less"),
        (Request(prompt_ids=[3, 99], params=SamplingParams(max_tokens=2)), "token id 99"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name_and_the_rest_goes_on(request_: Request, said: str) -> None:
    made = engine()
    with pytest.raises(PromptError, match=said):
        made.submit(request_)
    good = ask(1, max_tokens=4)
    bad = Request(prompt_ids=request_.prompt_ids, params=request_.params, request_id="bad")
    done = answers([bad, good], made)
    assert done["bad"].finish_reason == "error" and said in str(done["bad"].error)
    assert len(done["1"].token_ids) >= 1 and done["1"].error is None


def test_cancelling_frees_the_slot_and_leaves_the_others_alone() -> None:
    made = engine(batch=2)
    want = answers([ask(1, max_tokens=25, ignore_eos=True)], engine(batch=1))["1"].token_ids
    for i in range(4):
        made.submit(ask(i, max_tokens=25, ignore_eos=True))
    with pytest.raises(ValueError, match="'2' is in use"):
        made.submit(ask(2, max_tokens=25))
    made.step()
    made.step()
    assert made.cancel("0") and made.cancel("3") and not made.cancel("3")
    assert (made.num_active, made.num_waiting) == (1, 1)
    done = {}
    while made.has_work:
        done |= {d.request_id: d.completion for d in made.step() if d.completion}
    assert sorted(done) == ["1", "2"]
    assert done["1"].token_ids == want


def test_deltas_add_up_to_the_completion() -> None:
    made, got = engine(batch=2), {"0": [], "1": []}  # type: ignore[var-annotated]
    for i in range(2):
        made.submit(ask(i, max_tokens=15))
    done = {}
    while made.has_work:
        for delta in made.step():
            got[delta.request_id] += delta.token_ids
            if delta.completion:
                done[delta.request_id] = delta.completion
    assert {i: c.token_ids for i, c in done.items()} == got


def test_typical_acceptance_with_its_tree_is_the_same_in_any_batch() -> None:
    requests = [ask(i, 4 + i, max_tokens=15, temperature=0.9, seed=i, ignore_eos=True) for i in range(4)]
    together = answers(requests, engine(batch=4))
    for request in requests:
        alone = answers([request], engine(batch=1))[request.request_id]
        assert together[request.request_id].token_ids == alone.token_ids


def test_heads_change_no_greedy_answer() -> None:
    """Swapping MEDUSA-1 heads changes speed only."""
    request = ask(0, max_tokens=30, ignore_eos=True)
    outputs = {
        tuple(
            answers([request], Engine(BACKBONE, heads, tree=tree, max_batch_size=1, context_length=96))["0"].token_ids
        )
        for heads, tree in (
            (HEADS, TREE),
            (random_heads(BACKBONE, seed=9, num_layers=2, lm_heads="own"), TREE),
            (None, None),
        )
    }
    assert len(outputs) == 1


def test_heads_that_guess_among_few_tokens_leave_all_tokens_to_the_backbone() -> None:
    request = ask(0, max_tokens=40, ignore_eos=True)
    few = random_heads(BACKBONE, vocabulary=torch.tensor([1, 4, 5, 8]))
    made = Engine(BACKBONE, few, tree=Tree.full([4, 3]), max_batch_size=1, context_length=96)
    done = answers([request], made)["0"]
    assert done.token_ids == answers([request], engine())["0"].token_ids
    assert set(done.token_ids) - {1, 4, 5, 8} and done.stats.num_steps < 39
    with pytest.raises(ValueError, match="5 best tokens but a head guesses among 4"):
        Engine(BACKBONE, few, tree=Tree.full([5]), max_batch_size=1, context_length=96)


def test_each_forward_is_told_and_a_limited_request_stays_within_its_nodes() -> None:
    records: list[StepRecord] = []
    made = Engine(BACKBONE, HEADS, tree=TREE, max_batch_size=2, context_length=96, on_step=records.append)
    requests = [ask(0, max_tokens=20, ignore_eos=True), ask(1, max_tokens=9, ignore_eos=True, tree_nodes=1)]
    done = answers(requests, made)
    assert done["1"].token_ids == answers([ask(1, max_tokens=9, ignore_eos=True)], engine())["1"].token_ids
    assert done["1"].stats.nodes_per_step == [0] + [1] * 8 and done["1"].stats.tokens_per_step == [1] * 9
    decodes = [r for r in records if r.phase == "decode"]
    assert done["0"].stats.nodes_per_step[1] == TREE.num_nodes == decodes[0].nodes
    assert sum(r.tokens for r in records if r.phase == "prefill") == 10, "two prompts of five tokens"
    assert sum(r.tokens for r in decodes) == 19 + 8 and {r.rows for r in decodes} == {1, 2}
    assert all(r.seconds > 0 for r in records)


def test_impossible_engines_are_refused() -> None:
    with pytest.raises(ValueError, match="max_batch_size"):
        engine(batch=0)
    with pytest.raises(ValueError, match=r"context_length must lie in \[2, 256\]"):
        engine(context=257)
    with pytest.raises(ValueError, match="there are 0 Medusa heads"):
        Engine(BACKBONE, None, tree=Tree.chain(1))
