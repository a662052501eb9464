"""What loads decodes as the model itself does; what cannot work is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import medusa
from medusa.backbone import Backbone, check_decodable, load_backbone
from medusa.errors import BackboneError
from medusa.fused_llama import FusedLlama
from medusa.heads import LogitTransform
from tests.tiny_models import FAMILIES, make_tiny_backbone_model, make_tiny_tokenizer, save_tiny_folder
from tests.unit.medusa.tiny import chain_placement

SMALL: dict[str, Any] = dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0)


def save(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family_loads_from_a_folder_and_generates(tmp_path: Path, family: str, dtype: str) -> None:
    model = medusa.load(save_tiny_folder(tmp_path / family, family), heads=None, dtype=dtype)
    out = model.generate("hello", max_tokens=8)
    assert len(out.token_ids) == 8 or out.finish_reason == "stop"


def test_a_logit_scale_of_the_backbone_is_applied(tmp_path: Path) -> None:
    config = GraniteConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, logits_scaling=4.0, eos_token_id=2)
    backbone = load_backbone(save(tmp_path / "granite", GraniteForCausalLM(config)), dtype="float32")
    assert backbone.transform == LogitTransform(scale=0.25)


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4))


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, state_size=4))


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=4))


@pytest.mark.parametrize(
    ("model", "said"), [(t5, "encoder–decoder"), (mamba, "recurrent state"), (bloom, "attention interface")]
)
def test_models_that_cannot_decode_trees_are_refused_by_name(tmp_path: Path, model: Any, said: str) -> None:
    with pytest.raises(BackboneError, match=said):
        load_backbone(save(tmp_path / "model", model()))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("layer_types", ["chunked_attention", "full_attention"], "chunked_attention"),
        ("attention_chunk_size", 8, "chunked attention"),
    ],
)
def test_layers_that_tree_attention_does_not_know_are_refused(field: str, value: object, said: str) -> None:
    model = make_tiny_backbone_model("llama")
    setattr(model.config, field, value)
    with pytest.raises(BackboneError, match=said):
        Backbone(model=model, tokenizer=make_tiny_tokenizer(), name="odd")


def test_a_model_that_treats_logits_in_an_unknown_way_is_refused_rather_than_decoded_wrongly() -> None:
    backbone = Backbone(model=make_tiny_backbone_model("gemma2"), tokenizer=make_tiny_tokenizer(), name="gemma2")
    with pytest.raises(BackboneError, match="not known here"):
        check_decodable(backbone)  # its soft-cap was not passed on


def test_sources_that_do_not_exist_get_one_line(tmp_path: Path) -> None:
    for name in (tmp_path / "nothing", tmp_path):
        with pytest.raises(BackboneError, match="cannot load backbone") as caught:
            load_backbone(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="unknown dtype 'int3'"):
        load_backbone(tmp_path, dtype="int3")


def test_the_fused_path_equals_the_generic_one() -> None:
    model = make_tiny_backbone_model("llama", 4)
    generic = Backbone(model=model, tokenizer=make_tiny_tokenizer(), name="llama")
    fused = Backbone(model=model, tokenizer=make_tiny_tokenizer(), name="llama", fused=FusedLlama(model))
    ids = torch.randint(0, 300, (2, 9))
    caches = [b.new_cache(num_slots=2, capacity=32) for b in (generic, fused)]
    with torch.inference_mode():
        for part, offset in ((ids, 0), (ids.flip(1), 9)):
            where = chain_placement(9, batch=2, offset=offset)
            ours, theirs = (b.step(part, where, c) for b, c in zip((fused, generic), caches, strict=True))
            torch.testing.assert_close(ours, theirs)
            torch.testing.assert_close(fused.logits(ours), generic.logits(theirs))
    torch.testing.assert_close(caches[1].store, caches[0].store)


def test_the_fused_path_declines_what_it_does_not_compute() -> None:
    assert FusedLlama.fits(make_tiny_backbone_model("llama"))
    assert not FusedLlama.fits(make_tiny_backbone_model("llama", attention_bias=True))
    assert not FusedLlama.fits(make_tiny_backbone_model("gemma2"))
