from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from medusa.tree_search import expected_tokens, grow_paths
from pipelines.calibrate import SizeCost, draw, draw_tree, expected_by_size

ACCURACY = (
    torch.rand(4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64).sort(1, descending=True).values
    / 4
)


def test_every_size_is_the_best_tree_of_that_size() -> None:
    paths = grow_paths(ACCURACY, 64)
    every = expected_by_size(ACCURACY, paths)
    assert len(every) == 64
    for nodes in (1, 2, 7, 33, 64):
        assert every[nodes - 1] == pytest.approx(expected_tokens(ACCURACY, grow_paths(ACCURACY, nodes)))
    gains = [later - earlier for earlier, later in itertools.pairwise(every)]
    assert gains == sorted(gains, reverse=True)


@pytest.mark.parametrize("nodes", [1, 2, 64])
def test_trees_and_curves_can_be_drawn(nodes: int, tmp_path: Path) -> None:
    paths = grow_paths(ACCURACY, nodes)
    assert draw_tree(tmp_path / "tree.png", paths, ACCURACY).stat().st_size > 1000
    curve = (SizeCost(nodes=1, expected_tokens=1.0, step_s=0.1),)
    assert draw(tmp_path / "curve.png", curve, 1, expected_by_size(ACCURACY, paths)).stat().st_size > 1000
