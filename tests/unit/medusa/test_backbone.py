"""What loads decodes as the model itself does; what cannot work is refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GraniteConfig,
    GraniteForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import medusa
from medusa.adapters import Adapters
from medusa.attention import layer_windows
from medusa.backbone import DTYPES, Backbone, _place, dtype_name, load_backbone, parse_dtype
from medusa.errors import BackboneError
from medusa.fused_llama import FusedLlama
from medusa.heads import LogitTransform
from tests.tiny_models import (
    FAMILIES,
    MAX_CONTEXT,
    make_tiny_backbone_model,
    make_tiny_tokenizer,
    save_tiny_folder,
    with_drawn_vectors,
)
from tests.unit.medusa.tiny import FUSED, logits_of_prompt_and_tree

SMALL: dict[str, Any] = dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0)


def save(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_every_family_loads_from_a_folder_and_generates(tmp_path: Path, family: str, dtype: str) -> None:
    model = medusa.load(save_tiny_folder(tmp_path / family, family), heads=None, dtype=dtype)
    out = model.generate("hello", max_tokens=8)
    assert len(out.token_ids) == 8 or out.finish_reason == "stop"


def test_a_truncated_file_of_weights_is_named(tmp_path: Path) -> None:
    folder = save_tiny_folder(tmp_path / "llama", "llama")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BackboneError, match="cannot load backbone"):
        load_backbone(folder)


def test_one_folder_has_one_fingerprint_in_any_type(tmp_path: Path) -> None:
    folder = save_tiny_folder(tmp_path / "llama", "llama")
    types = ("float64", "float32", "bfloat16", "float16")
    assert len({load_backbone(folder, dtype=dtype).fingerprint for dtype in types}) == 1


def test_a_logit_scale_of_the_backbone_is_applied(tmp_path: Path) -> None:
    config = GraniteConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, logits_scaling=4.0, eos_token_id=2)
    backbone = load_backbone(save(tmp_path / "granite", GraniteForCausalLM(config)), dtype="float32")
    assert backbone.transform == LogitTransform(scale=0.25)


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4))


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, state_size=4))


def gemma3() -> PreTrainedModel:
    text = dict(SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=8)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=4))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (t5, "encoder–decoder"),
        (mamba, "recurrent state"),
        (bloom, "attention interface"),
        (gemma3, "multimodal"),
    ],
)
def test_models_that_cannot_decode_trees_are_refused_by_name(tmp_path: Path, model: Any, said: str) -> None:
    with pytest.raises(BackboneError, match=said):
        load_backbone(save(tmp_path / "model", model()))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("layer_types", ["chunked_attention", "full_attention"], "chunked_attention"),
        ("attention_chunk_size", 8, "chunked attention"),
        ("rope_parameters", {"rope_type": "longrope"}, "longrope"),
        ("rope_parameters", {"full_attention": {"rope_type": "dynamic"}}, "dynamic"),
    ],
)
def test_layers_that_tree_attention_does_not_know_are_refused(field: str, value: object, said: str) -> None:
    model = make_tiny_backbone_model("llama")
    setattr(model.config, field, value)
    with pytest.raises(BackboneError, match=said):
        Backbone(model=model, tokenizer=make_tiny_tokenizer(), name="odd")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rotary_frequencies_are_the_models_own_in_any_type(tmp_path: Path, dtype: torch.dtype) -> None:
    """Rounded to 16 bits they would turn far positions by other angles."""
    folder = save_tiny_folder(tmp_path / "llama", "llama", head_dim=64)
    buffers = dict(load_backbone(folder, dtype=dtype).model.named_buffers())
    wanted = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_buffers())
    assert set(buffers) == set(wanted) and any("inv_freq" in name for name in buffers)
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, wanted[name], rtol=0, atol=0)


def test_weights_that_a_model_keeps_in_float32_stay_so() -> None:
    model = make_tiny_backbone_model("llama", dtype=torch.bfloat16)
    model.model.norm.weight.data = model.model.norm.weight.data.float()
    _place(model, torch.device("cpu"), torch.float16)
    kept = {name for name, weight in model.named_parameters() if weight.dtype == torch.float32}
    assert kept == {"model.norm.weight"}
    assert {weight.dtype for weight in model.parameters()} == {torch.float16, torch.float32}


def test_sources_that_do_not_exist_get_one_line(tmp_path: Path) -> None:
    for name in (tmp_path / "nothing", tmp_path):
        with pytest.raises(BackboneError, match=r"cannot load backbone|no model folder") as caught:
            load_backbone(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="unknown dtype 'int3'"):
        load_backbone(tmp_path, dtype="int3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "overrides"), FUSED)
def test_the_fused_path_equals_the_generic_one(family: str, overrides: dict[str, Any], dtype: torch.dtype) -> None:
    """A prompt, then a tree behind prefixes of different lengths. In low precision the oracle is float64, and the fused
    path, whatever kernel this CPU gives it, may err no more than twice what the generic one does."""
    model = with_drawn_vectors(make_tiny_backbone_model(family, 4, **overrides)).to(dtype)
    exact = Backbone(model=copy.deepcopy(model).double(), tokenizer=make_tiny_tokenizer(), name="llama")
    generic = Backbone(model=model, tokenizer=make_tiny_tokenizer(), name="llama")
    fused = Backbone(model=model, tokenizer=make_tiny_tokenizer(), name="llama", fused=FusedLlama(model))
    all_three = (fused, generic, exact)
    ids = torch.randint(0, 300, (2, 9))
    for logits in zip(*(logits_of_prompt_and_tree(backbone, ids) for backbone in all_three), strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
        else:
            ours, theirs = ((x - logits[2]).norm() / logits[2].norm() for x in logits[:2])
            assert ours <= 2 * theirs + 1e-4


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_tuned_backbone_is_fused_anew_with_its_biases_and_norms(family: str) -> None:
    """What is done to heads is copied out of the model, so a merge must copy it again."""
    model = make_tiny_backbone_model(family, 4)
    tuned = with_drawn_vectors(copy.deepcopy(model))
    backbone = Backbone(model=model, tokenizer=make_tiny_tokenizer(), name=family, fused=FusedLlama(model))
    before = backbone.logits(backbone.step_alone(torch.tensor([[3, 1, 4]])))
    tensors = {name: weight.detach() for name, weight in tuned.named_parameters()}
    backbone.merge(Adapters(kind="full", tensors=tensors))
    with torch.inference_mode():
        want = tuned(input_ids=torch.tensor([[3, 1, 4]])).logits
        found = backbone.logits(backbone.step_alone(torch.tensor([[3, 1, 4]])))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, before, rtol=1e-2)


def test_a_mistrals_layers_slide_whatever_they_are_called() -> None:
    """So it is in transformers, whose Mistral does not read `layer_types`."""
    config = make_tiny_backbone_model("mistral", layer_types=["full_attention"] * 2).config
    assert config.sliding_window is not None
    assert layer_windows(config) == {"sliding_attention": config.sliding_window}


def test_fusing_adds_no_copy_of_weights_that_stay_as_they_are() -> None:
    model = make_tiny_backbone_model("llama")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    FusedLlama(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    attn = model.model.layers[0].self_attn
    assert attn.q_proj.weight.untyped_storage().data_ptr() == attn.k_proj.weight.untyped_storage().data_ptr()


def test_the_fused_path_declines_what_it_does_not_compute() -> None:
    for family, overrides in FUSED:
        assert FusedLlama.fits(make_tiny_backbone_model(family, **overrides))
    for family, field in (("llama", "attention_bias"), ("llama", "mlp_bias"), ("qwen3", "attention_bias")):
        assert not FusedLlama.fits(make_tiny_backbone_model(family, **{field: True}))
    for window, fits in ((6, False), (MAX_CONTEXT - 1, False), (MAX_CONTEXT, True)):
        some = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
        assert FusedLlama.fits(make_tiny_backbone_model("qwen2", **some)) is fits, "do its layers see alike?"
    assert not FusedLlama.fits(make_tiny_backbone_model("gemma2"))


@pytest.mark.parametrize("dtype", [*dict.fromkeys(DTYPES.values())], ids=str)
def test_a_types_name_is_read_back_as_the_type(dtype: torch.dtype) -> None:
    assert parse_dtype(dtype_name(dtype)) == dtype
