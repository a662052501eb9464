"""The check after loading: faults are refused in every type, and what is only as rough as the model itself is not."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from medusa.backbone import Backbone
from medusa.decodable import CHECK_TEXT, SLACK, TOLERANCE, check_decodable, own_logits
from medusa.errors import BackboneError
from medusa.fused_llama import FusedLlama
from medusa.heads import LogitTransform
from tests.tiny_models import make_tiny_backbone_model, make_tiny_tokenizer

LOW = [torch.bfloat16, torch.float16]
IDS = torch.arange(3, 15)[None]


def rough_model(dtype: torch.dtype) -> PreTrainedModel:
    """Its keys are nearly all bias, so that rounding them to 16 bits moves its logits by more than any fault would have to."""
    model = make_tiny_backbone_model("qwen2", 1, num_hidden_layers=4)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            bias = layer.self_attn.k_proj.bias
            bias += 400 * torch.randn(bias.shape, generator=generator)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def backbone_of(model: PreTrainedModel, *, fused: bool = False, transform: LogitTransform | None = None) -> Backbone:
    return Backbone(
        model=model,
        tokenizer=make_tiny_tokenizer(),
        name="x",
        transform=transform or LogitTransform(),
        fused=FusedLlama(model) if fused else None,
    )


def gap(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    spread = (wanted - wanted.mean(dim=-1, keepdim=True)).norm()
    return ((logits - wanted).norm() / spread).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW])
def test_a_model_that_treats_logits_in_an_unknown_way_is_refused_rather_than_decoded_wrongly(
    dtype: torch.dtype,
) -> None:
    backbone = backbone_of(make_tiny_backbone_model("gemma2", dtype=dtype, final_logit_softcapping=1.0))
    with pytest.raises(BackboneError, match="not known here"):
        check_decodable(backbone)  # its soft-cap was not passed on


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_that_is_rough_by_itself_is_held_to_its_own_roughness(fused: bool) -> None:
    model = rough_model(torch.bfloat16)
    backbone = backbone_of(model, fused=fused)
    ids = torch.tensor([list(backbone.tokenizer(CHECK_TEXT)["input_ids"])])
    ours, theirs = backbone.logits(backbone.step_alone(ids)).double(), own_logits(backbone, ids)
    assert gap(ours, theirs) > TOLERANCE[torch.bfloat16], "the case that this is about"
    check_decodable(backbone)


def test_a_fault_in_a_rough_model_is_refused() -> None:
    model = rough_model(torch.bfloat16)
    noise = gap(own_logits(backbone_of(model), IDS), own_logits(backbone_of(model), IDS, widened=True))
    with pytest.raises(BackboneError, match="not known here"):
        check_decodable(backbone_of(model, transform=LogitTransform(scale=1 + 2 * SLACK * noise)))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text"])
def test_the_widened_forward_is_that_of_the_weights_in_float32_and_leaves_them_as_they_were(
    family: str, dtype: torch.dtype
) -> None:
    model = make_tiny_backbone_model(family, dtype=dtype)
    before = {name: (weight.data_ptr(), weight.dtype) for name, weight in model.named_parameters()}
    wide = copy.deepcopy(model)
    for weight in wide.parameters():
        weight.data = weight.data.float()
    found = own_logits(backbone_of(model), IDS, widened=True)
    torch.testing.assert_close(found, own_logits(backbone_of(wide), IDS), rtol=1e-4, atol=1e-4)
    assert before == {name: (weight.data_ptr(), weight.dtype) for name, weight in model.named_parameters()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_that_overflows_its_type_is_told_so() -> None:
    model = make_tiny_backbone_model("llama", dtype=torch.float16)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 1e5
    with pytest.raises(BackboneError, match="llama overflows float16; use bfloat16 or float32"):
        check_decodable(backbone_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_damaged_weights_are_not_called_an_overflow(dtype: torch.dtype) -> None:
    model = make_tiny_backbone_model("llama", dtype=dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = float("nan")
    with pytest.raises(BackboneError, match=r"llama gives no numbers .*: its weights are damaged; load them"):
        check_decodable(backbone_of(model))
