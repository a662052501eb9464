"""A tree follows from its paths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medusa.tree import Tree
from tests.unit.medusa.tiny import trees


@given(trees())
def test_every_node_sees_exactly_its_ancestors_and_itself(tree: Tree) -> None:
    for i, path in enumerate(tree.paths):
        seen = {j for j in range(tree.num_nodes) if tree.ancestor_mask[i, j]}
        assert seen == {j for j, other in enumerate(tree.paths) if path[: len(other)] == other}


@given(trees())
def test_depths_parents_and_leaves_follow_from_the_paths(tree: Tree) -> None:
    assert tree.paths[0] == () and tree.parents[0] == -1
    for node in range(1, tree.num_nodes):
        assert tree.paths[tree.parents[node]] == tree.paths[node][:-1]
        assert tree.parents[node] < node, "parents stand before children"
        assert tree.depths[node] == len(tree.paths[node])
    assert set(tree.leaves) == {n for n in range(tree.num_nodes) if n not in tree.parents}


@given(trees())
def test_short_paths_are_padded_with_no_node_rather_than_with_node_zero(tree: Tree) -> None:
    for node, depth in enumerate(tree.depths):
        row = tree.node_paths[node]
        assert (row[: depth + 1] >= 0).all() and (row[depth + 1 :] == -1).all()
        assert row[0] == 0 and row[depth] == node


def test_order_and_repetition_of_paths_do_not_matter() -> None:
    assert Tree.from_paths([(0, 0), (0,), (1,), (0,)]) == Tree.from_paths([(1,), (0,), (0, 0)])


@given(trees(), st.integers(1, 24))
def test_the_first_nodes_of_a_tree_are_a_tree(tree: Tree, num_nodes: int) -> None:
    cut = tree.first(min(num_nodes, tree.num_nodes))
    assert cut.paths == Tree.from_paths(cut.paths).paths and cut.paths == tree.paths[: cut.num_nodes]
    with pytest.raises(ValueError, match=rf"must lie in \[1, {tree.num_nodes}\]"):
        tree.first(tree.num_nodes + 1)


def test_a_grown_tree_keeps_its_order() -> None:
    paths = [(0,), (0, 0), (1,), (0, 1), (0, 0, 0), (1, 0)]
    tree = Tree.grown(paths)
    assert tree.paths == ((), *paths)
    for n in range(1, tree.num_nodes + 1):
        assert tree.first(n).paths == ((), *paths[: n - 1])
    with pytest.raises(ValueError, match=r"\[0, 0\] stands before its parent \[0\]"):
        Tree.grown([(0, 0), (0,)])
    with pytest.raises(ValueError, match="no parent"):
        Tree.grown([(0, 0)])


def test_shapes_by_name() -> None:
    assert Tree.root_only().num_nodes == 1 and Tree.root_only().depth == 0
    assert Tree.chain(3).paths == ((), (0,), (0, 0), (0, 0, 0))
    assert Tree.full([2, 3]).num_nodes == 1 + 2 + 6


@pytest.mark.parametrize(("paths", "said"), [([(0, 1)], r"no parent \[0\]"), ([(-1,)], "negative rank")])
def test_paths_that_are_no_tree_are_refused(paths: list[tuple[int, ...]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Tree.from_paths(paths)


def test_a_tree_deeper_than_the_heads_or_wider_than_the_vocabulary_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="4 deep but there are 3 Medusa heads"):
        Tree.chain(4).check_fits(num_heads=3, vocab_size=10)
    with pytest.raises(ValueError, match="12 best tokens but a head guesses among 10"):
        Tree.from_paths([(11,)]).check_fits(num_heads=3, vocab_size=10)


@given(trees())
def test_children_are_the_nodes_whose_parent_a_node_is(tree: Tree) -> None:
    found = {
        (above, node)
        for above, below in enumerate(tree.on(torch.device("cpu")).rows(2).children_of(1))
        for node in below
    }
    assert found == {(parent, node) for node, parent in enumerate(tree.parents) if node}


def test_device_tables_repeat_the_tree() -> None:
    tree = Tree.from_paths([(0,), (1,), (0, 2)])
    tables = tree.on(torch.device("cpu"))
    assert tables.ranks.tolist() == [0, 0, 1, 2]
    rows = tables.rows(2)
    assert rows.depths.tolist() == [[0, 1, 1, 2]] * 2 and rows.parents.tolist() == [[-1, 0, 0, 1]] * 2
    node = torch.tensor([3, 2])
    assert rows.path_to(node).tolist() == [[0, 1, 3], [0, 2, -1]] and rows.depth_of(node).tolist() == [2, 1]
