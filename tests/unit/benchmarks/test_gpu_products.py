"""Layers by our own products against the library's, and their measurement on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton (it comes with CUDA builds of torch)")
from benchmarks.gpu import products
from benchmarks.gpu.products import Layer, by_library, by_own
from tests.unit.benchmarks.test_gpu_speed import run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_layers_are_the_same_both_ways() -> None:
    layers = [Layer.random("tiny", device=DEVICE, dtype=torch.float32) for _ in range(2)]
    hidden = torch.randn(5, layers[0].gains.shape[1], device=DEVICE)
    want = by_library(layers, hidden)
    assert (want - hidden).norm() > 0.1 * hidden.norm(), "they do something"
    for cuts in (None, dict.fromkeys(products.PARTS, products.SWEEP[0])):
        torch.testing.assert_close(by_own(layers, hidden, cuts), want, rtol=1e-4, atol=1e-4)


def test_the_best_cut_of_each_product_is_set_beside_the_library(tmp_path: Path) -> None:
    sizes = ["--rows", "1", "--rows", "3", "--num-layers", "1", "--repeats", "1", "--tries", "2", "--copy-mib", "1"]
    record, page = run(products.main, tmp_path, "--shapes", "tiny", *sizes)
    assert set(record["figures"]) == {"1", "3"}
    for found in record["figures"].values():
        assert set(found["seconds"]) == {"library", "ours", "ours, best cuts"}
        assert set(found["blocks"]) == set(products.PARTS)
        assert all(value > 0 for value in found["seconds"].values()) and found["gaps"]["ours"] < 1e-5
    assert "share of the copy bandwidth" in page
