"""Trees chosen for each context: what is kept equals a brute-force choice, is always a tree, and changes no output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medusa.config import SamplingParams
from medusa.dynamic_tree import DynamicTree, best_nodes, kept_rows, node_scores, superset_tree
from medusa.engine import Engine, Request
from medusa.tree import DeviceTree, RowTrees, Tree
from tests.unit.medusa.test_decoder import backbone_of, decode, plain_continuation, prompt_of
from tests.unit.medusa.tiny import NUM_HEADS, random_heads, trees

CPU = torch.device("cpu")
RANKS = 6

# Few values, so that ties are the rule: 0 (certain), −inf (impossible) and some between.
scores_of = st.lists(
    st.sampled_from([0.0, -0.5, -1.0, -3.0, float("-inf")]), min_size=NUM_HEADS * RANKS, max_size=NUM_HEADS * RANKS
)


def table(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(NUM_HEADS, RANKS)


def rows_of(tree: DeviceTree, kept: torch.Tensor) -> RowTrees:
    rows = tree.rows(len(kept))
    return kept_rows(kept, depths=rows.depths, parents=rows.parents, depth=tree.depth)


def brute_force(tree: Tree, log_probs: torch.Tensor, num_nodes: int) -> list[int]:
    """The definition, read aloud: all nodes by score, then depth, then index; the first N."""
    scores = [float(sum(log_probs[d, rank] for d, rank in enumerate(path))) for path in tree.paths]
    return sorted(range(tree.num_nodes), key=lambda n: (-scores[n], tree.depths[n], n))[:num_nodes]


@settings(max_examples=60, deadline=None)
@given(tree=trees(max_nodes=40), values=st.lists(scores_of, min_size=1, max_size=3), data=st.data())
def test_the_best_nodes_are_those_of_brute_force_and_always_a_tree(
    tree: Tree, values: list[list[float]], data: st.DataObject
) -> None:
    assume(tree.num_nodes > 1)
    num_nodes = data.draw(st.integers(2, tree.num_nodes))
    log_probs = torch.stack([table(one) for one in values])
    device = DynamicTree(superset=tree, num_nodes=num_nodes).on(CPU)
    kept = best_nodes(device, node_scores(device.superset, log_probs))
    for row, nodes in enumerate(kept.tolist()):
        assert nodes == brute_force(tree, log_probs[row], num_nodes)
        for length in {1, num_nodes // 2 + 1, num_nodes}:
            paths = [tree.paths[node] for node in nodes[:length]]
            assert Tree.from_paths(paths).num_nodes == length, "each beginning is prefix-closed and holds the root"


@settings(max_examples=40, deadline=None)
@given(tree=trees(max_nodes=30))
def test_trees_linked_by_their_parents_are_those_of_the_paths(tree: Tree) -> None:
    want = tree.on(CPU).rows(2)
    found = RowTrees.linked(depths=want.depths, parents=want.parents, depth=tree.depth)
    for name in ("depths", "parents", "node_paths", "ancestor_mask"):
        assert torch.equal(getattr(found, name), getattr(want, name)), name


@settings(max_examples=40, deadline=None)
@given(tree=trees(max_nodes=30), values=st.lists(scores_of, min_size=2, max_size=2), data=st.data())
def test_the_tables_of_a_row_are_those_of_the_tree_that_its_nodes_make(
    tree: Tree, values: list[list[float]], data: st.DataObject
) -> None:
    assume(tree.num_nodes > 1)
    num_nodes = data.draw(st.integers(2, tree.num_nodes))
    device = DynamicTree(superset=tree, num_nodes=num_nodes).on(CPU)
    kept = best_nodes(device, node_scores(device.superset, torch.stack([table(one) for one in values])))
    rows = rows_of(device.superset, kept)
    for row, nodes in enumerate(kept.tolist()):
        paths = [tree.paths[node] for node in nodes]
        place = {path: index for index, path in enumerate(paths)}
        for index, path in enumerate(paths):
            ancestors = [place[path[:length]] for length in range(len(path) + 1)]
            assert rows.depths[row, index] == len(path)
            assert rows.parents[row, index] == (ancestors[-2] if path else -1)
            assert rows.node_paths[row, index].tolist() == ancestors + [-1] * (tree.depth - len(path))
            assert rows.ancestor_mask[row, index].nonzero().flatten().tolist() == sorted(ancestors)


def test_all_nodes_of_the_superset_are_the_static_tree() -> None:
    tree = Tree.full([2, 2])
    device = DynamicTree(superset=tree, num_nodes=tree.num_nodes).on(CPU)
    kept = best_nodes(device, torch.zeros(1, tree.num_nodes))
    rows, static = rows_of(device.superset, kept), device.superset.rows(1)
    for name in ("depths", "parents", "node_paths", "ancestor_mask"):
        assert torch.equal(getattr(rows, name), getattr(static, name)), name


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_dynamic_trees_decode_greedily_what_the_model_itself_decodes(family: str) -> None:
    backbone = backbone_of(family)
    prompts = [prompt_of(n, n) for n in (5, 17, 1)]
    want = [plain_continuation(backbone, prompt, 25) for prompt in prompts]
    for num_nodes in (1, 6, 20):
        tree = DynamicTree(superset=Tree.full([6, 4, 2]), num_nodes=num_nodes)
        answers, _ = decode(backbone, tree, prompts, [SamplingParams()] * 3, 25)
        assert [answer[:25] for answer in answers] == want


@settings(max_examples=12, deadline=None)
@given(
    superset=trees(max_nodes=40),
    data=st.data(),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    options=st.sampled_from(
        [{}, {"top_k": 4}, {"top_p": 0.8}, {"presence_penalty": 0.7, "frequency_penalty": 0.3, "logit_bias": {3: 2.0}}]
    ),
    temperature=st.sampled_from([0.0, 0.8, 1.3]),
    seed=st.integers(0, 1000),
)
def test_a_seeded_answer_does_not_depend_on_the_trees_chosen(
    superset: Tree, data: st.DataObject, lengths: list[int], options: dict[str, Any], temperature: float, seed: int
) -> None:
    tree = DynamicTree(
        superset=superset,
        num_nodes=data.draw(st.integers(1, superset.num_nodes)),
        temperatures=data.draw(st.sampled_from([None, (0.5, 1.0, 2.0)])),
    )
    requests = [
        Request(
            prompt_ids=prompt_of(length, seed + choice),
            request_id=str(choice),
            params=SamplingParams(
                temperature=temperature, acceptance="rejection", seed=seed, choice=choice, max_tokens=12,
                ignore_eos=True, tree_nodes=data.draw(st.sampled_from([None, 1, 4])), **options,
            ),
        )
        for choice, length in enumerate(lengths)
    ]  # fmt: skip
    assert answers(requests, tree) == answers(requests, None)


def answers(requests: list[Request], tree: DynamicTree | None) -> dict[str, list[int]]:
    """With one engine for all, or plainly."""
    backbone = backbone_of("llama")
    engine = Engine(backbone, random_heads(backbone) if tree else None, tree=tree, max_batch_size=3, context_length=128)
    return {done.request_id: done.token_ids for done in engine.run(requests)}


def test_typical_acceptance_with_the_whole_superset_is_that_of_the_static_tree() -> None:
    backbone, tree = backbone_of("llama"), Tree.full([4, 2, 2])
    params = [SamplingParams(temperature=0.9, acceptance="typical", epsilon=0.02, delta=0.1, seed=s) for s in (1, 2)]
    prompts = [prompt_of(n, n) for n in (4, 9)]
    static, _ = decode(backbone, tree, prompts, params, 30)
    dynamic, _ = decode(backbone, DynamicTree(superset=tree, num_nodes=tree.num_nodes), prompts, params, 30)
    assert dynamic == static


def test_guesses_are_weighed_by_the_heads_own_softmax() -> None:
    backbone = backbone_of("llama")
    some = torch.tensor([0, 2, 3, 5, 7, 8, 11])
    for vocabulary in (None, some):
        heads = random_heads(backbone, vocabulary=vocabulary).double()
        reader, hidden = backbone.lm_head_for(vocabulary), torch.randn(3, backbone.hidden_size, dtype=torch.float64)
        heat = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
        logits = heads.logits(hidden, reader, 2)
        tokens, log_probs = heads.weighed_tokens(logits, 4, heat)
        assert torch.equal(tokens, heads.guesses(hidden, reader, num_ranks=4, num_heads=2))
        places = tokens if vocabulary is None else torch.searchsorted(vocabulary, tokens)
        torch.testing.assert_close(log_probs.exp(), torch.softmax(logits / heat, dim=-1).gather(-1, places))


def test_the_superset_is_grown_from_accuracies_or_is_what_paths_there_are() -> None:
    accuracy = [[0.5, 0.2, 0.1], [0.3, 0.2, 0.1]]
    assert superset_tree(accuracy, [(0,)]).num_nodes == 1 + 3 + 9, "all there is"
    assert superset_tree(None, [(0,), (0, 0)]) == Tree.chain(2)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_nodes": 8}, "a dynamic tree of these heads has 1 to 7 nodes, got 8"),
        ({"num_nodes": 0}, "got 0"),
        ({"num_nodes": 3, "temperatures": (1.0, 0.0)}, "above 0"),
    ],
)
def test_what_cannot_be_chosen_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DynamicTree(superset=Tree.full([2, 2]), **fields)


def test_a_dynamic_tree_must_fit_the_heads() -> None:
    tree = DynamicTree(superset=Tree.full([2, 2]), num_nodes=3, temperatures=(1.0, 1.0, 1.0))
    tree.check_fits(num_heads=3, vocab_size=10)
    with pytest.raises(ValueError, match="3 head temperatures were given for 2 heads"):
        tree.check_fits(num_heads=2, vocab_size=10)
    with pytest.raises(ValueError, match="2 deep but there are 1"):
        tree.check_fits(num_heads=1, vocab_size=10)
