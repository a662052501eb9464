"""Products that do what lies between them, against the textbook in float64; and the measurement on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton (it comes with CUDA builds of torch)")
from benchmarks.gpu import products
from benchmarks.gpu.products import EPS, Blocks, Layer, by_library, by_own, product
from tests.unit.benchmarks.test_gpu_speed import run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCKS = [Blocks(outputs=16, inputs=16, warps=4, stages=3), Blocks(outputs=32, inputs=64, warps=4, stages=3)]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 16, 16), (3, 72, 40), (17, 64, 33), (70, 24, 16)])
def test_a_product_with_norm_gate_and_residual_is_the_textbooks(
    rows: int, inputs: int, outputs: int, blocks: Blocks
) -> None:
    x, gain, weight, residual = drawn(rows, inputs), drawn(inputs), drawn(2 * outputs, inputs), drawn(rows, outputs)
    normed = F.rms_norm(x.double(), (inputs,), gain.double(), EPS)
    gate, up = (normed @ weight.double().t()).chunk(2, dim=1)
    first = weight[:outputs]
    for found, want in (
        (product(x, first, blocks), x.double() @ first.double().t()),
        (product(x, first, blocks, gain=gain), gate),
        (product(x, first, blocks, residual=residual), x.double() @ first.double().t() + residual.double()),
        (product(x, weight, blocks, gain=gain, gated=True), F.silu(gate) * up),
    ):
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-4)


def test_layers_are_the_same_both_ways() -> None:
    layers = [Layer.random("tiny", device=DEVICE, dtype=torch.float32) for _ in range(2)]
    hidden = drawn(5, layers[0].gains.shape[1])
    found = by_own(layers, hidden, dict.fromkeys(products.PARTS, BLOCKS[0]))
    assert (found - hidden).norm() > 0.1 * hidden.norm(), "they do something"
    torch.testing.assert_close(found, by_library(layers, hidden), rtol=1e-4, atol=1e-4)


def test_the_best_cut_of_each_product_is_set_beside_the_library(tmp_path: Path) -> None:
    sizes = ["--rows", "1", "--rows", "3", "--num-layers", "1", "--repeats", "1", "--tries", "2", "--copy-mib", "1"]
    record, page = run(products.main, tmp_path, "--shapes", "tiny", *sizes)
    assert set(record["figures"]) == {"1", "3"}
    for found in record["figures"].values():
        assert set(found["seconds"]) == {"library", "ours"} and set(found["blocks"]) == set(products.PARTS)
        assert all(value > 0 for value in found["seconds"].values()) and found["gaps"]["ours"] < 1e-5
    assert "share of the copy bandwidth" in page
