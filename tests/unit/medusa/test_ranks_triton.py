"""The Triton kernels rank as the keys in plain torch do: on a GPU, or through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton (it comes with CUDA builds of torch)")
from medusa import ranks_triton
from medusa.candidates import ranked_by_keys

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INFINITY = float("inf")
SPECIAL = [0.0, -0.0, INFINITY, -INFINITY, float("nan"), 1.0, -1.0, 6e-8, -6e-8, 65504.0, -65504.0]


@pytest.fixture(autouse=True)
def _only_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared with the plain code must not be the plain code."""

    def refused(*_: object) -> Tensor:
        raise AssertionError("the kernels were to serve this")

    monkeypatch.setattr(ranks_triton, "ranked_by_keys", refused)


def assert_ranks_as_keys_do(logits: Tensor, num_ranks: int) -> None:
    logits = logits.to(DEVICE)
    found = ranks_triton.ranked_places(logits, num_ranks)
    want = ranked_by_keys(logits, num_ranks)
    assert found.dtype == want.dtype and found.shape == want.shape
    assert torch.equal(found, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "num_ranks"),
    [(1, 1), (2, 1), (7, 7), (100, 10), (2047, 16), (2048, 5), (2049, 16), (4097, 3), (6143, 1), (9000, 16)],
)
def test_random_and_tied_logits(size: int, num_ranks: int, dtype: torch.dtype) -> None:
    assert_ranks_as_keys_do(torch.randn(3, size).to(dtype), num_ranks)
    assert_ranks_as_keys_do(torch.randint(-2, 3, (3, size)).to(dtype), num_ranks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -1.5, INFINITY, -INFINITY, float("nan"), -float("nan")])
def test_of_equal_logits_the_first_comes_first(value: float, dtype: torch.dtype) -> None:
    logits = torch.full((2, 4100), value, dtype=dtype, device=DEVICE)
    assert ranks_triton.ranked_places(logits, 12).tolist() == [list(range(12))] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_infinities_subnormals_and_nans(dtype: torch.dtype) -> None:
    special = torch.tensor(SPECIAL)
    assert_ranks_as_keys_do(special.to(dtype), len(SPECIAL))
    assert_ranks_as_keys_do(special[torch.randint(len(SPECIAL), (4, 5000))].to(dtype), 16)
    zeros = torch.tensor([-0.0, 0.0, -0.0], dtype=dtype, device=DEVICE)
    assert ranks_triton.ranked_places(zeros, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_any_pattern_of_bits(dtype: torch.dtype) -> None:
    """Every NaN too, of either sign: bf16 takes 16 bits to rank, float32 takes 32."""
    limits = torch.iinfo(dtype)
    bits = torch.randint(limits.min, limits.max, (2, 5000)).to(dtype)
    assert_ranks_as_keys_do(bits.view(torch.bfloat16 if dtype == torch.int16 else torch.float32), 16)


def test_the_best_may_all_stand_in_the_last_and_shortest_chunk() -> None:
    logits = torch.full((1, 2 * ranks_triton.CHUNK + 20), -INFINITY)
    logits[0, -20:] = torch.arange(20.0)
    assert_ranks_as_keys_do(logits, 16)
    logits[0, -20:] = -INFINITY
    assert_ranks_as_keys_do(logits, 16)


@pytest.mark.parametrize("shape", [(50,), (2, 3, 50), (1, 1, 1, 50), (0, 50), (2, 0, 50)])
def test_leading_dimensions_are_kept(shape: tuple[int, ...]) -> None:
    assert_ranks_as_keys_do(torch.randn(shape), 4)


def test_logits_need_not_lie_in_one_piece() -> None:
    logits = torch.randn(6, 4, 300)
    for view in (
        logits.transpose(0, 1),
        logits[::2, 1],
        logits[..., 5:250],
        logits[..., ::3],
        logits[:1].expand(5, 4, 300),
    ):
        assert_ranks_as_keys_do(view, 9)


def test_float64_is_ranked_as_float32() -> None:
    assert_ranks_as_keys_do(1 + torch.rand(2, 3000, dtype=torch.float64) * 1e-6, 16)


@pytest.mark.parametrize(("size", "num_ranks"), [(100, ranks_triton.MAX_RANKS + 1), (300_000, 64), (5, 0)])
def test_what_the_kernels_are_not_made_for_is_left_to_the_plain_code(
    size: int, num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(1, size, device=DEVICE)
    with pytest.raises(AssertionError, match="were to serve"):
        ranks_triton.ranked_places(logits, num_ranks)
    monkeypatch.setattr(ranks_triton, "ranked_by_keys", ranked_by_keys)
    assert torch.equal(ranks_triton.ranked_places(logits, num_ranks), ranked_by_keys(logits, num_ranks))


def test_most_ranks_of_a_row() -> None:
    assert_ranks_as_keys_do(torch.randn(1, 5000), ranks_triton.MAX_RANKS)
