"""Acceptance against slow references written from the definitions, path by path, with Python numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa.acceptance import Acceptance, accept
from medusa.candidates import ranked_tokens, static_candidates
from medusa.config import SamplingParams
from medusa.sampling import SamplingRows, draw, filter_logits
from medusa.tree import Tree
from tests.unit.medusa.tiny import trees

CPU, VOCAB = torch.device("cpu"), 8


def verified(tree: Tree, batch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidate tokens [B,N] with distinct siblings, and peaked random logits [B,N,V]."""
    generator = torch.Generator().manual_seed(seed)
    heads = torch.randn(batch, 3, VOCAB, generator=generator)
    roots = torch.randint(0, VOCAB, (batch,), generator=generator)
    tokens = static_candidates(tree.on(CPU), roots, ranked_tokens(heads, VOCAB))
    return tokens, torch.randn(batch, tree.num_nodes, VOCAB, generator=generator, dtype=torch.float64) * 2


def run(
    tree: Tree,
    tokens: torch.Tensor,
    logits: torch.Tensor,
    params: list[SamplingParams],
    position: int,
    *,
    early_exit: bool = False,
) -> Acceptance:
    rows, positions = SamplingRows.of(params, CPU), torch.full((tokens.shape[0],), position)
    return accept(tree.on(CPU).rows(len(tokens)), tokens, logits, rows, positions, early_exit=early_exit)


def choose(logits: torch.Tensor, params: SamplingParams, position: int) -> int:
    return int(draw(logits[None], SamplingRows.of([params], CPU), torch.tensor([position])))


def walk_reference(
    tree: Tree, tokens: list[int], logits: torch.Tensor, params: SamplingParams, position: int
) -> tuple[int, int]:
    """Choose token after token as plain decoding would, staying in the tree as long as it has the token."""
    node = 0
    while True:
        token = choose(logits[node], params, position + tree.depths[node] + 1)
        children = [n for n, parent in enumerate(tree.parents) if parent == node and tokens[n] == token]
        if not children:
            return node, token
        node = children[0]


def typical_reference(tree: Tree, tokens: list[int], logits: torch.Tensor, params: SamplingParams) -> int:
    best, best_key = 0, (0, 0.0)
    top = torch.tensor([params.top_k]), torch.tensor([params.top_p], dtype=torch.float64)
    allowed = [filter_logits(row[None] / params.temperature, *top)[0].isfinite() for row in logits]
    for node, depth in enumerate(tree.depths):
        score, walk, fine = 0.0, node, True
        while walk:
            parent = tree.parents[walk]
            probs = torch.softmax(logits[parent] / params.temperature, -1).tolist()
            entropy = -sum(p * math.log(p) for p in probs if p > 0)
            fine &= probs[tokens[walk]] > min(params.epsilon, params.delta * math.exp(-entropy))
            fine &= bool(allowed[parent][tokens[walk]])
            score += math.log(probs[tokens[walk]])
            walk = parent
        if fine and (depth, score) > best_key and node:
            best, best_key = node, (depth, score)
    return best


@settings(max_examples=120, deadline=None)
@given(trees(), st.integers(0, 10**6), st.sampled_from([0.0, 0.7, 1.5]), st.integers(0, 50), st.booleans())
def test_greedy_and_rejection_walk_as_plain_decoding_chooses(
    tree: Tree, seed: int, temperature: float, position: int, early_exit: bool
) -> None:
    tokens, logits = verified(tree, 3, seed)
    params = [SamplingParams(temperature=temperature, acceptance="rejection", seed=seed, choice=c) for c in range(3)]
    got = run(tree, tokens, logits, params, position, early_exit=early_exit)
    for row in range(3):
        node, root = walk_reference(tree, tokens[row].tolist(), logits[row], params[row], position)
        assert (got.node[row], got.next_root[row], got.num_accepted[row]) == (node, root, tree.depths[node])


@settings(max_examples=120, deadline=None)
@given(
    trees(),
    st.integers(0, 10**6),
    st.sampled_from([0.5, 1.0]),
    st.sampled_from([(0.09, 0.3), (0.4, 0.9), (0.02, 0.1)]),
    st.sampled_from([{}, {"top_k": 2}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.7}]),
)
def test_typical_takes_the_longest_path_above_the_threshold_and_inside_the_filters(
    tree: Tree, seed: int, temperature: float, thresholds: tuple[float, float], top: dict[str, Any]
) -> None:
    tokens, logits = verified(tree, 2, seed)
    epsilon, delta = thresholds
    params = SamplingParams(
        temperature=temperature, acceptance="typical", epsilon=epsilon, delta=delta, seed=seed, **top
    )
    got = run(tree, tokens, logits, [params] * 2, 5)
    for row in range(2):
        node = typical_reference(tree, tokens[row].tolist(), logits[row], params)
        assert (got.node[row], got.num_accepted[row]) == (node, tree.depths[node])
        assert got.next_root[row] == choose(logits[row, node], params, 5 + tree.depths[node] + 1)


def test_every_scheme_runs_and_rows_of_a_mixed_batch_equal_rows_alone() -> None:
    tree = Tree.full([4, 3, 2])
    tokens, logits = verified(tree, 5, 11)
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.8, acceptance="typical", top_k=3, top_p=0.8),
        SamplingParams(temperature=0.8, acceptance="typical", root="greedy"),
        SamplingParams(temperature=0.8, acceptance="rejection", top_p=0.9),
        SamplingParams(temperature=0.8),
    ]
    together = run(tree, tokens, logits, params, 3)
    for row, own in enumerate(params):
        alone = run(tree, tokens[row : row + 1], logits[row : row + 1], [own], 3)
        assert (alone.node[0], alone.next_root[0]) == (together.node[row], together.next_root[row])


@settings(max_examples=120, deadline=None)
@given(trees(), st.integers(0, 10**6), st.lists(st.integers(1, 26), min_size=3, max_size=3), st.booleans())
def test_a_row_limited_to_n_nodes_accepts_what_the_tree_of_its_first_n_nodes_accepts(
    tree: Tree, seed: int, limits: list[int], all_greedy: bool
) -> None:
    tokens, logits = verified(tree, 3, seed)
    mixed = [dict(), dict(temperature=0.9, acceptance="rejection"), dict(temperature=0.9)]
    schemes = [dict()] * 3 if all_greedy else mixed
    params = [SamplingParams(tree_nodes=n, seed=seed, **s) for n, s in zip(limits, schemes, strict=True)]  # type: ignore[arg-type]
    got = run(tree, tokens, logits, params, 4)
    for row, own in enumerate(params):
        small = tree.first(min(limits[row], tree.num_nodes))
        n = small.num_nodes
        free = replace(own, tree_nodes=None)
        want = run(small, tokens[row : row + 1, :n], logits[row : row + 1, :n], [free], 4)
        assert got.node[row] < n
        assert (got.node[row], got.num_accepted[row], got.next_root[row]) == (
            want.node[0], want.num_accepted[0], want.next_root[0],
        )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(trees(), st.integers(0, 10**6))
def test_edited_logits_are_walked_at_once_as_step_by_step(tree: Tree, seed: int) -> None:
    tokens, logits = verified(tree, 3, seed)
    params = [
        SamplingParams(logit_bias={seed % VOCAB: 3.0}),
        SamplingParams(presence_penalty=1.5, frequency_penalty=0.5),
        SamplingParams(),
    ]
    rows = SamplingRows.of(params, CPU, [[1], [seed % VOCAB, 2], []])
    position = torch.full((3,), 4)
    at_once, walked = (
        accept(tree.on(CPU).rows(3), tokens, logits.clone(), rows, position, early_exit=early_exit)
        for early_exit in (False, True)
    )
    for name in ("node", "num_accepted", "next_root"):
        assert torch.equal(getattr(at_once, name), getattr(walked, name))


def test_padding_never_accepts_a_real_token_zero() -> None:
    """The reference pads short paths with token 0: where token 0 is likely, it accepts nodes that do not exist."""
    tree = Tree.from_paths([(0,), (1,), (0, 0), (0, 0, 0)])
    tokens = torch.tensor([[3, 0, 5, 0, 0]])
    logits = torch.full((1, 5, VOCAB), -10.0)
    logits[..., 0] = 10.0  # token 0 everywhere
    logits[0, 0, :] = -10.0
    logits[0, 0, 5] = 10.0  # but the short path's token at the root
    for params in (
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, acceptance="rejection"),
    ):
        got = run(tree, tokens, logits, [params], 9)
        assert (got.node[0], got.num_accepted[0], got.next_root[0]) == (2, 1, 0)


def test_the_root_is_always_accepted() -> None:
    tree = Tree.from_paths([(0,)])
    logits = torch.full((1, 2, VOCAB), 0.0)
    logits[0, 0, 6] = 20.0
    for scheme in ("greedy", "typical", "rejection"):
        params = SamplingParams(temperature=0.0 if scheme == "greedy" else 1.0, acceptance=scheme)  # type: ignore[arg-type]
        got = run(tree, torch.tensor([[1, 2]]), logits, [params], 0)
        assert (got.node[0], got.num_accepted[0], got.next_root[0]) == (0, 0, 6)


@pytest.mark.parametrize("top", [{"top_k": 1}, {"top_p": 0.05}])
def test_typical_accepts_nothing_outside_the_requests_own_filters(top: dict) -> None:
    tree = Tree.from_paths([(0,)])
    logits = torch.zeros(1, 2, VOCAB)
    logits[0, 0, :2] = torch.tensor([2.0, 1.9])  # token 1 is typical, but second
    tokens = torch.tensor([[4, 1]])
    free, filtered = SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, **top)
    assert run(tree, tokens, logits, [free], 0).node[0] == 1
    assert run(tree, tokens, logits, [filtered], 0).node[0] == 0


def test_higher_epsilon_and_delta_are_the_stricter_ones() -> None:
    tree = Tree.full([3, 3])
    tokens, logits = verified(tree, 40, 2)
    accepted = [
        run(tree, tokens, logits, [SamplingParams(temperature=1.0, epsilon=e, delta=d)] * 40, 0)
        .num_accepted.sum()
        .item()
        for e, d in ((0.01, 0.1), (0.09, 0.3), (0.5, 0.9))
    ]
    assert accepted[0] > accepted[1] > accepted[2]
