"""On a GPU the ranks of logits come from two Triton kernels, and are those of the plain code. Needs CUDA and Triton."""

from __future__ import annotations

import pytest
import torch

from medusa.candidates import ranked_by_keys, ranked_places
from medusa.triton_support import has_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _needs_triton() -> None:
    if not has_triton():
        pytest.skip("needs Triton")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(
    ("shape", "num_ranks"),
    [((1,), 1), ((3, 7), 7), ((2, 4, 2049), 16), ((5, 49_152), 10), ((1, 128_256), 64), ((2, 300_000), 64)],
)
def test_the_kernels_rank_as_the_plain_code_does(shape: tuple[int, ...], num_ranks: int, dtype: torch.dtype) -> None:
    random = torch.randn(shape, device="cuda").to(dtype)
    tied = torch.randint(-3, 4, shape, device="cuda").to(dtype)
    for logits in (random, tied, torch.zeros_like(random), -random.sqrt()):  # a root of less than 0 is NaN
        assert torch.equal(ranked_places(logits, num_ranks), ranked_by_keys(logits, num_ranks))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_infinities_and_nans_rank_as_in_the_plain_code(dtype: torch.dtype) -> None:
    infinity, nan = float("inf"), float("nan")
    special = torch.tensor([0.0, -0.0, infinity, -infinity, nan, -nan, 6e-8, -6e-8, 1.0], dtype=dtype, device="cuda")
    logits = special[torch.randint(len(special), (5, 49_152), device="cuda")]
    assert torch.equal(ranked_places(special, len(special)), ranked_by_keys(special, len(special)))
    assert torch.equal(ranked_places(logits, 10), ranked_by_keys(logits, 10))


def test_ranks_are_recorded_in_a_graph_and_follow_new_logits() -> None:
    logits = torch.randn(5, 49_152, device="cuda").bfloat16()
    ranked_places(logits, 10)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        places = ranked_places(logits, 10)
    for _ in range(3):
        logits.copy_(torch.randn(5, 49_152, device="cuda"))
        graph.replay()
        assert torch.equal(places, ranked_by_keys(logits, 10))
