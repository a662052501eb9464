"""Penalties and biases change a tree's output exactly as they change plain decoding's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa.config import SamplingParams
from medusa.engine import Engine, Request
from medusa.errors import PromptError
from medusa.logit_edits import LogitEdits
from medusa.tree import Tree
from tests.unit.medusa.tiny import VOCAB, random_heads, tiny_backbone, trees

CPU = torch.device("cpu")
BACKBONE = tiny_backbone(seed=7, dtype=torch.float64)
HEADS = random_heads(BACKBONE)

penalties = st.sampled_from([0.0, 0.0, 0.4, 2.0, -0.7])
biases = st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.5, 0.8, 3.0]), max_size=4)
edits = st.fixed_dictionaries({"presence_penalty": penalties, "frequency_penalty": penalties, "logit_bias": biases})


def openai_logits(logits: list[float], history: list[int], params: SamplingParams) -> list[float]:
    """OpenAI's formula, token by token: mu[j] − c[j]·alpha_frequency − [c[j] > 0]·alpha_presence, and the bias."""
    return [
        mu
        + params.logit_bias.get(j, 0.0)
        - history.count(j) * params.frequency_penalty
        - (j in history) * params.presence_penalty
        for j, mu in enumerate(logits)
    ]


def prompt_of(length: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def answer_of(requests: list[Request], tree: Tree, batch: int) -> dict[str, list[int]]:
    made = Engine(BACKBONE, HEADS, tree=tree, max_batch_size=batch, context_length=96)
    return {done.request_id: done.token_ids for done in made.run(requests)}


@settings(max_examples=60, deadline=None)
@given(tree=trees(), asked=st.lists(edits, min_size=1, max_size=3), seed=st.integers(0, 10**6))
def test_each_node_is_edited_by_its_own_history(tree: Tree, asked: list[dict[str, Any]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = [SamplingParams(**one) for one in asked]
    logits = torch.randn(len(params), tree.num_nodes, VOCAB, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, VOCAB, (len(params), tree.num_nodes), generator=generator)
    emitted = [[*prompt_of(row * 3, seed), int(tokens[row, 0])] for row in range(len(params))]  # the root is the last
    edited = logits.clone()
    found = LogitEdits.of(params, emitted, CPU)
    if found is not None:
        found.apply(edited, tokens, tree.on(CPU).rows(len(tokens)))
    for row, own in enumerate(params):
        for node in range(tree.num_nodes):
            path = [n for n in tree.node_paths[node].tolist() if n > 0]
            history = emitted[row] + tokens[row, path].tolist()
            want = openai_logits(logits[row, node].tolist(), history, own)
            assert edited[row, node].tolist() == pytest.approx(want, abs=1e-12)


def test_rows_that_ask_for_nothing_are_left_as_they_are() -> None:
    plain, biased = SamplingParams(), SamplingParams(logit_bias={3: 1.0})
    assert LogitEdits.of([plain, plain], [[1], [2]], CPU) is None
    found = LogitEdits.of([plain, biased, plain], [[1], [2], [3]], CPU)
    assert found is not None and found.rows == [1]
    logits = torch.randn(3, 1, VOCAB)
    logits[0, 0, 5] = float("nan")  # would spread through any sum or product
    before = logits.clone()
    found.apply(logits, torch.tensor([[1], [2], [3]]), Tree.root_only().on(CPU).rows(3))
    assert torch.equal(logits[[0, 2]].nan_to_num(7.0), before[[0, 2]].nan_to_num(7.0))
    assert (logits[1] != before[1]).nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_is_the_same_number_in_the_tree_and_behind_it(dtype: torch.dtype) -> None:
    """Bit for bit, in the types that users run: token 4 twice on the path, or twice emitted."""
    params = SamplingParams(presence_penalty=0.3, frequency_penalty=0.7, logit_bias={4: 1.1})
    logits = torch.randn(1, 3, VOCAB).to(dtype)
    in_tree, emitted = logits.clone(), logits[:, 2:].clone()
    chain, alone = Tree.chain(2).on(CPU), Tree.root_only().on(CPU)
    for scores, tokens, tree, history in (
        (in_tree, torch.tensor([[9, 4, 4]]), chain, [9]),
        (emitted, torch.tensor([[4]]), alone, [9, 4, 4]),
    ):
        found = LogitEdits.of([params], [history], CPU)
        assert found is not None
        found.apply(scores, tokens, tree.rows(1))
    assert torch.equal(in_tree[:, 2], emitted[:, 0])


def test_plain_decoding_with_edits_is_the_formula_over_the_models_own_forward() -> None:
    params = SamplingParams(
        max_tokens=25, ignore_eos=True, presence_penalty=0.5, frequency_penalty=0.9, logit_bias={2: 1.5, 7: -100}
    )
    prompt = prompt_of(6, 3)
    ids: list[int] = list(prompt)
    with torch.inference_mode():
        for _ in range(25):
            logits = BACKBONE.logits(BACKBONE.hidden_states(torch.tensor([ids]))[0, -1]).tolist()
            scores = openai_logits(logits, ids[len(prompt) :], params)
            ids.append(scores.index(max(scores)))
    got = answer_of([Request(prompt_ids=prompt, params=params)], Tree.full([6, 3]), 1)["0"]
    assert got == ids[len(prompt) :]
    without = answer_of(
        [Request(prompt_ids=prompt, params=SamplingParams(max_tokens=25, ignore_eos=True))], Tree.root_only(), 1
    )
    assert got != without["0"], "the edits changed something"


@settings(max_examples=12, deadline=None)
@given(
    tree=trees(),
    jobs=st.lists(st.tuples(edits, st.sampled_from([0.0, 0.9]), st.integers(2, 14)), min_size=1, max_size=5),
    batch=st.integers(1, 4),
)
def test_any_tree_in_any_batch_decodes_what_plain_decoding_does(
    tree: Tree, jobs: list[tuple[dict[str, Any], float, int]], batch: int
) -> None:
    """Answers end at different steps, so sequences move between slots on the way."""
    requests = [
        Request(
            prompt_ids=prompt_of(4 + i, i),
            params=SamplingParams(
                temperature=temperature, acceptance="rejection", seed=i, max_tokens=count, ignore_eos=True, **asked
            ),
            request_id=str(i),
        )
        for i, (asked, temperature, count) in enumerate(jobs)
    ]
    together = answer_of(requests, tree, batch)
    for request in requests:
        assert together[request.request_id] == answer_of([request], Tree.root_only(), 1)[request.request_id]


def test_typical_acceptance_never_emits_a_banned_token_though_the_tree_holds_it() -> None:
    tree, banned = Tree.full([VOCAB, 4]), {1: -100.0, 4: -100.0, 6: -100.0}

    def said(**bias: Any) -> list[int]:
        requests = [
            Request(
                prompt_ids=prompt_of(5, i),
                params=SamplingParams(temperature=1.2, seed=i, max_tokens=30, ignore_eos=True, epsilon=0.01, **bias),
                request_id=str(i),
            )
            for i in range(4)
        ]
        return [token for tokens in answer_of(requests, tree, 4).values() for token in tokens]

    assert set(said()) >= set(banned), "they are said where they are not banned"
    assert not set(said(logit_bias=banned)) & set(banned)


def test_a_bias_of_a_token_outside_the_vocabulary_is_refused_by_name() -> None:
    made = Engine(BACKBONE, HEADS, tree=Tree.chain(1), max_batch_size=1, context_length=96)
    with pytest.raises(PromptError, match="logit_bias names token id 12; the vocabulary has ids 0 to 11"):
        made.submit(Request(prompt_ids=[1], params=SamplingParams(logit_bias={12: 1}, max_tokens=2)))
