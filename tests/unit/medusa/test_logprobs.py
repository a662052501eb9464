"""Log-probabilities are the model's own, whatever tree, scheme or edit chose the token."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import medusa
from medusa.config import SamplingParams
from medusa.engine import Completion, Engine, Request
from medusa.logprobs import token_logprobs
from medusa.tree import Tree
from tests.unit.medusa.tiny import VOCAB, random_heads, tiny_backbone

BACKBONE = tiny_backbone(seed=7)
HEADS = random_heads(BACKBONE)
TREE = Tree.full([VOCAB, 4, 2])


def test_alternatives_are_the_best_and_of_equal_ones_the_lowest_ids() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -2.0, 3.0], [0.0, 0.0, 5.0, 0.0, 0.0]])
    first, second = token_logprobs(logits, [3, 2], [4, 0])
    total = math.log(3 * math.exp(3) + math.exp(1) + math.exp(-2))
    assert first.token_id == 3 and first.logprob == pytest.approx(-2 - total)
    assert [token for token, _ in first.top] == [1, 2, 4, 0]
    assert [value for _, value in first.top] == pytest.approx([3 - total] * 3 + [1 - total])
    assert second.logprob == pytest.approx(5 - math.log(math.exp(5) + 4)) and second.top == ()


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    (only,) = token_logprobs(torch.zeros(1, 3), [0], [20])
    assert only.top == tuple((token, pytest.approx(-math.log(3))) for token in range(3))


def requests() -> list[Request]:
    """Every scheme, with and without edits, asking for different numbers of alternatives or for nothing."""
    settings = [
        dict(logprobs=3),
        dict(),
        dict(logprobs=0, temperature=0.8, acceptance="rejection", seed=1),
        dict(logprobs=20, temperature=0.8, seed=2),
        dict(logprobs=2, presence_penalty=1.0, logit_bias={3: 2.0, 5: -100}, max_tokens=9),
        dict(logprobs=1, temperature=1.1, frequency_penalty=1.0, acceptance="rejection"),
    ]
    return [
        Request(
            prompt_ids=torch.randint(0, VOCAB, (4 + i,), generator=torch.Generator().manual_seed(i)).tolist(),
            params=SamplingParams(**{"max_tokens": 14, "ignore_eos": True, **each}),  # type: ignore[arg-type]
            request_id=str(i),
        )
        for i, each in enumerate(settings)
    ]


@pytest.mark.parametrize("tree", [Tree.root_only(), TREE])
def test_they_equal_those_of_a_fresh_forward_over_the_final_text(tree: Tree) -> None:
    made = Engine(BACKBONE, HEADS, tree=tree, max_batch_size=3, context_length=96)
    done: dict[str, Completion] = {answer.request_id: answer for answer in made.run(requests())}
    for request in requests():
        answer, num_top = done[request.request_id], request.params.logprobs
        if num_top is None:
            assert answer.logprobs == ()
            continue
        assert [one.token_id for one in answer.logprobs] == answer.token_ids
        text = torch.tensor([[*request.prompt_ids, *answer.token_ids]])
        with torch.inference_mode():
            hidden = BACKBONE.hidden_states(text)[0, len(request.prompt_ids) - 1 : -1]
            want = torch.log_softmax(BACKBONE.logits(hidden), dim=-1)
        for one, own in zip(answer.logprobs, want, strict=True):
            assert one.logprob == pytest.approx(float(own[one.token_id]), abs=1e-4)
            assert [value for _, value in one.top] == pytest.approx(
                own.sort(descending=True).values[:num_top].tolist(), abs=1e-4
            )
            assert [value for _, value in one.top] == pytest.approx(
                [float(own[token]) for token, _ in one.top], abs=1e-4
            )


def test_deltas_carry_them_beside_their_tokens_and_nothing_past_the_end() -> None:
    made = Engine(BACKBONE, HEADS, tree=TREE, max_batch_size=1, context_length=96)
    made.submit(Request(prompt_ids=[3, 1], params=SamplingParams(max_tokens=10, ignore_eos=True, logprobs=1)))
    gathered = []
    while made.has_work:
        for delta in made.step():
            assert [one.token_id for one in delta.logprobs] == delta.token_ids
            gathered += delta.logprobs
            last = delta
    assert last.completion is not None and last.completion.logprobs == tuple(gathered) and len(gathered) == 10


def test_generate_passes_them_on(tiny_folder: Path) -> None:
    model = medusa.load(tiny_folder, heads=None)
    answer = model.generate("Hello", max_tokens=5, logprobs=2)
    assert [one.token_id for one in answer.logprobs] == answer.token_ids
    assert all(one.top[0] == (one.token_id, one.logprob) for one in answer.logprobs), "greedy takes the most likely"
    assert model.generate("Hello", max_tokens=5).logprobs == ()
