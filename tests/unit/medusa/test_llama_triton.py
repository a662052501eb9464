"""A Llama layer's Triton kernels against PyTorch's operations, on a GPU or interpreted, and whole models by them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton (it comes with CUDA builds of torch)")
from medusa import llama_torch, llama_triton
from medusa.backbone import Backbone
from medusa.fused_llama import FusedLlama
from medusa.kv_cache import KVCache
from medusa.llama_torch import HeadEdits
from tests.tiny_models import make_tiny_backbone_model, make_tiny_tokenizer, with_drawn_vectors
from tests.unit.medusa.tiny import FUSED, logits_of_prompt_and_tree

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = (
    torch.bfloat16 if torch.cuda.is_available() else torch.float16
)  # the interpreter cuts bfloat16 off, a GPU rounds it
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 3, 40), (3, 1, 576)])
def test_the_sum_is_rounded_as_it_is_stored_and_then_normed(shape: tuple[int, ...]) -> None:
    hidden, update, weight = drawn(*shape), drawn(*shape), drawn(shape[-1])
    found, normed = llama_triton.add_norm(hidden, update, weight, 1e-5)
    assert torch.equal(found, hidden + update)
    wide = found.double()
    want = wide * (wide.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    torch.testing.assert_close(normed.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(llama_triton.norm(found, weight, 1e-5), normed)


def test_the_norm_of_half_precision_is_that_of_the_rounded_sum() -> None:
    hidden, update, weight = (drawn(2, 64, dtype=torch.float16) for _ in range(3))
    found, normed = llama_triton.add_norm(hidden, update, weight[0], 1e-5)
    want, want_normed = llama_torch.add_norm(hidden, update, weight[0], 1e-5)
    assert torch.equal(found, want)
    torch.testing.assert_close(normed, want_normed, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("width", [3, 1024, 1500])
def test_gates(width: int, dtype: torch.dtype) -> None:
    gate_up = drawn(2, 3, 2 * width, dtype=dtype) * 8
    want = llama_torch.gated(gate_up.double())
    torch.testing.assert_close(llama_triton.gated(gate_up).double(), want, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("edited", ["", "bias", "norms", "bias and norms"])
@pytest.mark.parametrize(("heads", "groups", "size", "new"), [(2, 1, 8, 1), (3, 3, 64, 5), (1, 5, 24, 2)])
def test_heads_turn_and_keys_and_values_lie_where_the_cache_has_them(
    heads: int, groups: int, size: int, new: int, edited: str, dtype: torch.dtype
) -> None:
    found = []
    edits = HeadEdits(
        bias=drawn(heads * (groups + 2) * size, dtype=dtype) if "bias" in edited else None,
        gains=drawn(2, size, dtype=dtype) if "norms" in edited else None,
        eps=1e-5,
    )
    qkv = drawn(2, new, heads * (groups + 2) * size, dtype=dtype)
    angle = drawn(2, new, size // 2).repeat(1, 1, 2)
    before = drawn(4, 3, heads, 20, size, dtype=dtype)
    offsets = torch.tensor([7, 0], device=DEVICE)
    for ops in (llama_torch, llama_triton):
        cache = KVCache(
            num_layers=2,
            num_slots=3,
            capacity=20,
            num_kv_heads=heads,
            head_dim=size,
            dtype=dtype,
            device=DEVICE,
        )
        cache.store.copy_(before)
        cache.begin(first_slot=1, offsets=offsets, num_new=new, length=16)
        turned = (angle.cos().to(dtype), angle.sin().to(dtype))
        found.append((*ops.rotate_into(cache, 1, qkv, *turned, groups=groups, edits=edits), cache.store))
    for want, got in zip(*found, strict=True):
        assert want.shape == got.shape
        torch.testing.assert_close(got, want, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    assert torch.equal(found[1][3][:2], before[:2])
    assert torch.equal(found[1][3][:, 0], before[:, 0])


@pytest.mark.parametrize(("family", "overrides"), [FUSED[0], FUSED[2], FUSED[4], FUSED[6]])
def test_a_model_is_the_same_by_these_kernels(family: str, overrides: dict[str, Any]) -> None:
    model = with_drawn_vectors(make_tiny_backbone_model(family, 4, **overrides)).to(DEVICE)
    generic = Backbone(model=model, tokenizer=make_tiny_tokenizer(), name=family)
    ids = torch.randint(0, 300, (2, 9))
    want = logits_of_prompt_and_tree(generic, ids)
    found = logits_of_prompt_and_tree(replace(generic, fused=FusedLlama(model, gpu_kernels="triton")), ids)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
