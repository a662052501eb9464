"""Products that do what lies between them, against the textbook in float64, and how they are cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton (it comes with CUDA builds of torch)")
from medusa.products_triton import SHARED_BYTES, Blocks, blocks_for, product

EPS = 1e-5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCKS = [Blocks(outputs=16, inputs=16, warps=4, stages=3), Blocks(outputs=32, inputs=64, warps=4, stages=3)]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


@pytest.mark.parametrize("blocks", [None, *BLOCKS])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 16, 16), (3, 72, 40), (17, 64, 33), (70, 24, 16)])
def test_a_product_with_norm_gate_and_residual_is_the_textbooks(
    rows: int, inputs: int, outputs: int, blocks: Blocks | None
) -> None:
    x, gain, weight, residual = drawn(rows, inputs), drawn(inputs), drawn(2 * outputs, inputs), drawn(rows, outputs)
    normed = F.rms_norm(x.double(), (inputs,), gain.double(), EPS)
    gate, up = (normed @ weight.double().t()).chunk(2, dim=1)
    first = weight[:outputs]
    for found, want in (
        (product(x, first, blocks=blocks), x.double() @ first.double().t()),
        (product(x, first, blocks=blocks, gain=gain, eps=EPS), gate),
        (product(x, first, blocks=blocks, residual=residual), x.double() @ first.double().t() + residual.double()),
        (product(x, weight, blocks=blocks, gain=gain, eps=EPS, gated=True), F.silu(gate) * up),
    ):
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-4)


def test_a_norm_within_a_product_sees_huge_and_tiny_rows_alike() -> None:
    x, gain, weight = torch.stack([drawn(48) * 1e15, drawn(48) * 1e-3]), drawn(48), drawn(16, 48)
    want = F.rms_norm(x.double(), (48,), gain.double(), EPS) @ weight.double().t()
    torch.testing.assert_close(product(x, weight, gain=gain, eps=EPS).double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size_out", [16, 576, 4096, 12288])
@pytest.mark.parametrize("element_size", [2, 4])
def test_a_cut_feeds_every_processor_and_fits_its_memory_whatever_the_rows(
    size_out: int, gated: bool, element_size: int
) -> None:
    few, many = (
        blocks_for(size_out, rows=rows, gated=gated, processors=132, element_size=element_size) for rows in (16, 64)
    )
    assert (few.outputs, few.inputs) == (many.outputs, many.inputs), "a row's sums are taken in one order"
    assert few.outputs == 16 or size_out / few.outputs >= 0.75 * 132
    for cut, rows in ((few, 16), (many, 64)):
        held = cut.stages * cut.inputs * element_size * (cut.outputs * (1 + gated) + rows)
        assert held <= SHARED_BYTES and cut.stages >= 2


def test_float16_is_not_computed() -> None:
    with pytest.raises(AssertionError):
        product(drawn(1, 16).half(), drawn(16, 16).half())
