"""Whatever arrives, leaves, is cut short or found in the prefix cache: each answer is the one the request gets alone.

The oracle is plain decoding, one request at a time, in an engine of one slot without prefix cache, policy or chunks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa.backbone import Backbone
from medusa.config import SamplingParams
from medusa.engine import Completion, Delta, Engine, Request, StepRecord
from medusa.heads import MedusaHeads
from medusa.prefix_cache import BLOCK
from medusa.tree import Tree
from medusa.tree_policy import StepCosts, TreePolicy
from tests.unit.medusa.tiny import chain_placement, random_heads, tiny_backbone

CONTEXT = 128
TREE = Tree.full([6, 3, 2])
CHUNK = 8


def backbone(dtype: torch.dtype) -> tuple[Backbone, MedusaHeads]:
    made = tiny_backbone(seed=7, dtype=dtype, eos_token_id=11)
    made.model.generation_config.eos_token_id = 11
    made.tokenizer.eos_token = None
    return made, random_heads(made)


MODELS = {dtype: backbone(dtype) for dtype in (torch.float32, torch.float64)}


@dataclass(frozen=True, kw_only=True)
class Moody(TreePolicy):
    """Another size at every step: speed is none of its business."""

    moods: Iterator[int] = field(default_factory=lambda: itertools.cycle([4, 8, 2, TREE.num_nodes, 1]))

    def choose(self, batch: int, gain: float = 1.0) -> int:
        return next(self.moods)


def moody() -> Moody:
    return Moody(expected={1: 1.0}, costs=StepCosts(seconds={1: {1: 1.0}}))


def engine(dtype: torch.dtype = torch.float64, batch: int = 3, tree: Tree = TREE, **options: Any) -> Engine:
    made, heads = MODELS[dtype]
    return Engine(made, heads, tree=tree, max_batch_size=batch, context_length=CONTEXT, **options)


@cache
def prompt_of(length: int, family: int) -> tuple[int, ...]:
    """Prompts of one family begin alike, up to the shorter one's end."""
    return tuple(torch.randint(0, 11, (CONTEXT,), generator=torch.Generator().manual_seed(family)).tolist()[:length])


def request(
    name: str, length: int, family: int, params: SamplingParams, on_token: Callable[[int], bool] | None = None
) -> Request:
    return Request(prompt_ids=list(prompt_of(length, family)), params=params, request_id=name, on_token=on_token)


@cache
def alone(length: int, family: int, params: SamplingParams, dtype: torch.dtype = torch.float64) -> Completion:
    (done,) = engine(dtype, 1, Tree.root_only()).run([request("0", length, family, params)])
    return done


def params_of(kind: int, max_tokens: int, limit: int | None = None) -> SamplingParams:
    rejection = dict(temperature=0.9, acceptance="rejection", seed=kind)
    return SamplingParams(max_tokens=max_tokens, tree_nodes=limit, **({} if kind == 0 else rejection))  # type: ignore[arg-type]


def poison(made: Engine) -> None:
    """NaN into the keys and values of every slot that nobody holds."""
    for slot in range(made.num_active, made.max_batch_size):
        made.decoder.cache.store[:, slot] = float("nan")
        made.decoder.cache._used[slot] = made.decoder.cache.capacity


def step(made: Engine) -> list[Delta]:
    deltas = made.step()
    poison(made)
    return deltas


arrivals = st.tuples(
    st.just("submit"),
    st.integers(1, 60),  # prompt tokens: up to eight chunks
    st.integers(0, 2),  # family
    st.integers(0, 2),  # greedy, or a seed
    st.integers(1, 12),  # max_tokens
    st.sampled_from([None, None, 1, 3]),  # tree_nodes
)
events = st.lists(
    st.one_of(arrivals, arrivals, st.tuples(st.just("step")), st.tuples(st.just("cancel"), st.integers(0, 40))),
    max_size=24,
)


@settings(max_examples=25, deadline=None)
@given(
    events=events,
    batch=st.sampled_from([1, 2, 3, 6]),
    prefixes=st.sampled_from([0, 2 * BLOCK, 1000]),
    shrinks=st.booleans(),
)
def test_the_engine_behaves_as_its_model_says(events: list[tuple], batch: int, prefixes: int, shrinks: bool) -> None:
    """The model: a list of requests in order of arrival, the tokens each got, and who may still get some."""
    made = engine(batch=batch, prefill_tokens=CHUNK, prefix_cache_tokens=prefixes, policy=moody() if shrinks else None)
    asked: list[tuple[int, int, SamplingParams]] = []
    got: dict[int, list[int]] = {}
    open_: list[int] = []  # neither finished nor cancelled, in order of arrival
    begun: list[int] = []

    def advance() -> None:
        for delta in step(made):
            number = int(delta.request_id)
            assert number in open_, "nothing comes after the end"
            if not got[number]:
                begun.append(number)
            got[number] += delta.token_ids
            if delta.completion is not None:
                open_.remove(number)
                assert delta.completion.token_ids == got[number]
                check(number, delta.completion)
        assert made.num_active + made.num_waiting == len(open_), "no slot leaks, nobody is lost"
        assert made.num_active <= batch

    def check(number: int, done: Completion) -> None:
        length, family, params = asked[number]
        want = alone(length, family, replace(params, tree_nodes=None))
        assert (done.token_ids, done.finish_reason) == (want.token_ids, want.finish_reason)
        stats = done.stats
        assert stats.prompt_tokens == length and stats.cached_tokens < length
        assert stats.cached_tokens % BLOCK == 0 and (prefixes or not stats.cached_tokens)
        assert len(stats.tokens_per_step) == len(stats.nodes_per_step) and stats.num_tokens == len(done.token_ids)
        assert max(stats.nodes_per_step) <= (params.tree_nodes or TREE.num_nodes)
        assert all(tokens <= nodes or nodes == 0 for tokens, nodes in
                   zip(stats.tokens_per_step, stats.nodes_per_step, strict=True))  # fmt: skip

    for kind, *what in events:
        if kind == "submit":
            length, family, seed, max_tokens, limit = what
            asked.append((length, family, params_of(seed, max_tokens, limit)))
            number = len(asked) - 1
            got[number] = []
            made.submit(request(str(number), *asked[number]))
            open_.append(number)
        elif kind == "cancel":
            number = what[0]
            assert made.cancel(str(number)) == (number in open_)
            if number in open_:
                open_.remove(number)
        else:
            advance()
    # Nobody starves: each step reads a chunk or decodes at least one token for all who run.
    work = sum(length // CHUNK + 2 + params.max_tokens for length, _, params in asked)
    for _ in range(2 * work):
        if not made.has_work:
            break
        advance()
    assert not open_ and not made.has_work and made.num_active == made.num_waiting == 0
    assert begun == sorted(begun), "first come, first served"
    assert made.prefixes.num_tokens <= prefixes
    assert all(made.decoder.length_of(slot) == 0 for slot in range(batch)), "everything is free"


@pytest.mark.parametrize("kind", [0, 5])
def test_float32_agrees_too(kind: int) -> None:
    made = engine(torch.float32, prefill_tokens=CHUNK, prefix_cache_tokens=500, policy=moody())
    jobs = [(5 + 9 * i, i % 2, params_of(kind, 12)) for i in range(6)]
    done = {c.request_id: c for c in made.run(request(str(i), *job) for i, job in enumerate(jobs))}
    for i, job in enumerate(jobs):
        assert done[str(i)].token_ids == alone(*job, torch.float32).token_ids
    assert sum(c.stats.cached_tokens for c in done.values()) > 0


def test_a_long_prompt_stalls_nobody() -> None:
    records: list[StepRecord] = []
    made = engine(prefill_tokens=CHUNK, on_step=records.append)
    free = SamplingParams(max_tokens=40, ignore_eos=True, tree_nodes=1)
    made.submit(request("running", 4, 0, free))
    made.step()
    made.submit(request("long", 70, 1, free))
    made.submit(request("behind", 3, 2, free))
    got: dict[str, list[int]] = {"running": [], "long": [], "behind": []}
    while not got["behind"]:
        deltas = made.step()
        for delta in deltas:
            got[delta.request_id] += delta.token_ids
        assert len({d.request_id for d in deltas}) == len(deltas)
    chunks = [r for r in records if r.phase == "prefill"]
    assert [r.tokens for r in chunks] == [4, *[8] * 8, 6, 3] and all(r.nodes == 0 for r in chunks)
    phases = [r.phase for r in records]
    assert ("prefill", "prefill") not in itertools.pairwise(phases[1:]), "one chunk between two decode steps"
    assert len(got["running"]) == phases.count("decode") == 9


def test_a_half_read_prompt_in_an_idle_row_is_not_disturbed() -> None:
    """Five sequences are decoded as six rows: the sixth slot is that of the prompt being read, between its chunks."""
    made = engine(batch=6, prefill_tokens=CHUNK, tree=TREE)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    for i in range(5):
        made.submit(request(str(i), 4, i, params))
    while made.num_waiting:
        made.step()
    made.submit(request("half", 60, 5, params))
    done = {}
    while made.has_work:
        done |= {d.request_id: d.completion for d in step(made) if d.completion}
    assert done["half"].token_ids == alone(60, 5, params).token_ids
    assert all(done[str(i)].token_ids == alone(4, i, params).token_ids for i in range(5))


def test_the_first_tokens_of_a_chunk_leave_at_once_and_short_prompts_share_one() -> None:
    made = engine(batch=4, prefill_tokens=32)
    for i in range(4):
        made.submit(request(str(i), 6 + i % 2, i, params_of(0, 5)))
    deltas = made.step()
    assert [d.request_id for d in deltas] == ["0", "1", "2", "3"]
    assert [len(d.token_ids) for d in deltas] == [1] * 4


def test_a_prompt_found_in_the_prefix_cache_gives_the_same_answer_and_the_same_cache() -> None:
    made = engine(batch=2, prefill_tokens=32, prefix_cache_tokens=1000)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    first, again = (next(iter(made.run([request(n, 50, 0, params)]))) for n in "ab")
    assert first.token_ids == again.token_ids == alone(50, 0, params).token_ids
    assert (first.stats.cached_tokens, again.stats.cached_tokens) == (0, 48)
    # A chat that goes on: its next prompt holds the answer, read from the accepted nodes of trees.
    turn = [*prompt_of(50, 0), *again.token_ids, 3, 4]
    made.submit(Request(prompt_ids=turn, params=params, request_id="c"))
    done = [d for d in step(made) if d.completion]
    assert not done and made.num_active == 1
    fresh = made.backbone.new_cache(num_slots=1, capacity=CONTEXT)
    with torch.inference_mode():
        hidden = made.backbone.step(torch.tensor([turn]), chain_placement(len(turn)), fresh)
    kept = made.decoder.cache.store[:, 0, :, : len(turn)]
    torch.testing.assert_close(kept, fresh.store[:, 0, :, : len(turn)], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(made.decoder.hidden[0], hidden[0, -1], rtol=1e-9, atol=1e-9)
    while made.has_work:
        done += [d for d in made.step() if d.completion]
    assert done[0].completion and done[0].completion.stats.cached_tokens == 64
    cold = engine(batch=1, tree=Tree.root_only())
    (want,) = cold.run([Request(prompt_ids=turn, params=params)])
    assert done[0].completion.token_ids == want.token_ids


def test_requests_that_come_together_share_what_they_begin_with() -> None:
    made = engine(batch=4, prefill_tokens=64, prefix_cache_tokens=1000)
    params = [SamplingParams(max_tokens=6, temperature=1.0, acceptance="rejection", choice=i) for i in range(4)]
    done = {c.request_id: c for c in made.run(request(str(i), 40, 0, p) for i, p in enumerate(params))}
    assert [done[str(i)].stats.cached_tokens for i in range(4)] == [0, 32, 32, 32]
    assert all(done[str(i)].token_ids == alone(40, 0, p).token_ids for i, p in enumerate(params))


def test_tuned_weights_find_no_prefix_of_the_original_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(prefix_cache_tokens=1000)
    params = params_of(0, 2)
    assert [c.stats.cached_tokens for n in "ab" for c in made.run([request(n, 40, 0, params)])] == [0, 32]
    monkeypatch.setattr(made.backbone, "version", 1)
    assert [c.stats.cached_tokens for n in "cd" for c in made.run([request(n, 40, 0, params)])] == [0, 32]


def test_a_half_read_prompt_is_cancelled_within_the_step_and_its_slot_is_good_again() -> None:
    made = engine(batch=2, prefill_tokens=CHUNK)
    params = params_of(0, 8)
    made.submit(request("running", 5, 0, params))
    made.submit(request("half", 60, 1, params))
    while made.num_waiting:
        made.step()
    made.step()
    assert made.num_active == 2
    assert made.cancel("half") and made.num_active == 1 and not made.cancel("half")
    poison(made)
    made.submit(request("next", 30, 2, params))
    done = {}
    while made.has_work:
        done |= {d.request_id: d.completion for d in step(made) if d.completion}
    assert done["next"].token_ids == alone(30, 2, params).token_ids
    assert done["running"].token_ids == alone(5, 0, params).token_ids


def test_a_request_whose_caller_fails_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []

    def breaks(token: int) -> bool:
        seen.append(token)
        if len(seen) == 4:
            raise RuntimeError("the pipe is broken")
        return False

    params = SamplingParams(max_tokens=15, ignore_eos=True)
    made = engine()
    requests = [request("bad", 5, 0, params, breaks), request("good", 9, 1, params)]
    done = {c.request_id: c for c in made.run(requests)}
    assert done["bad"].finish_reason == "error" and "RuntimeError: the pipe is broken" in str(done["bad"].error)
    assert done["bad"].token_ids == seen == alone(5, 0, params).token_ids[:4]
    assert done["good"].token_ids == alone(9, 1, params).token_ids and done["good"].error is None
    assert "on_token of request bad failed" in caplog.text and not made.has_work


def test_typical_acceptance_keeps_its_tree_whatever_the_policy_offers() -> None:
    params = [SamplingParams(max_tokens=15, temperature=0.9, seed=i, ignore_eos=True) for i in range(3)]
    want = {c.request_id: c for i, p in enumerate(params) for c in engine(batch=1).run([request(str(i), 9, i, p)])}
    policy = TreePolicy(expected={1: 1.0}, costs=StepCosts(seconds={1: {1: 1.0}}))  # always plain decoding
    jobs = [*(request(str(i), 9, i, p) for i, p in enumerate(params)), request("greedy", 9, 4, params_of(0, 40))]
    done = {c.request_id: c for c in engine(batch=4, policy=policy).run(jobs)}
    for i in range(3):
        assert done[str(i)].token_ids == want[str(i)].token_ids
        assert set(done[str(i)].stats.nodes_per_step[1:]) == {TREE.num_nodes}
    assert done["greedy"].token_ids == alone(9, 4, params_of(0, 40)).token_ids


def test_a_typical_request_of_few_nodes_is_that_of_the_small_tree_in_any_company() -> None:
    params = SamplingParams(max_tokens=20, temperature=0.9, seed=3, ignore_eos=True, tree_nodes=7)
    small = next(iter(engine(batch=1, tree=TREE.first(7)).run([request("0", 9, 0, params)])))
    company = [request("0", 9, 0, params), request("1", 9, 1, SamplingParams(max_tokens=30, temperature=1.2))]
    for jobs in (company[:1], company):
        done = {c.request_id: c for c in engine(batch=2).run(jobs)}
        assert done["0"].token_ids == small.token_ids and set(done["0"].stats.nodes_per_step[1:]) == {7}


def test_the_policy_sees_the_batch_and_its_size_is_run() -> None:
    records: list[StepRecord] = []
    seconds = {1: {1: 1.0, 4: 1.0, 8: 1.5}, 2: {1: 1.0, 4: 3.0, 8: 9.0}}
    policy = TreePolicy(expected={1: 1.0, 4: 2.0, 8: 2.5}, costs=StepCosts(seconds=seconds))
    made = engine(batch=2, policy=policy, on_step=records.append)
    long, short = SamplingParams(max_tokens=30, ignore_eos=True), SamplingParams(max_tokens=4, ignore_eos=True)
    done = {c.request_id: c for c in made.run([request("long", 5, 0, long), request("short", 5, 1, short)])}
    assert done["long"].token_ids == alone(5, 0, long).token_ids
    assert {(r.rows, r.nodes) for r in records if r.phase == "decode"} == {(2, 1), (1, 4)}


@pytest.mark.parametrize(("options", "said"), [
    ({"prefill_tokens": 100}, "prefill_tokens must be one of 8, 16"),
    ({"prefix_cache_tokens": -1}, "must be 0"),
])  # fmt: skip
def test_impossible_options_are_refused(options: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        engine(**options)
