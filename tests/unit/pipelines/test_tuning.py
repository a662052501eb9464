"""A tuned backbone goes on where it was left; one that was tuned in another way, or not to be tuned at all, is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medusa.backbone import Backbone, load_backbone
from medusa.checkpoint import save_checkpoint
from medusa.config import HeadsConfig
from medusa.heads import MedusaHeads
from pipelines.config import Config, TrainSection
from pipelines.errors import ConfigError
from pipelines.records import Answer
from pipelines.train_loop import initial_heads, make_learner
from pipelines.tuning import adapted_layers, adapters_off, exported, make_tunable

IDS = torch.tensor([[5, 6, 7, 8]])
ROWS = [Answer(id="a", prompt_id="a", prompt_ids=[5, 6], response_ids=[7, 8, 9, 10])]


def loaded(tiny_folder: Path) -> Backbone:
    backbone = load_backbone(tiny_folder, dtype="float32", fused=False)
    assert backbone.fingerprint
    return backbone


def settings(**train: object) -> TrainSection:
    return TrainSection.model_validate({"method": "medusa2", "lora_rank": 2, "lora_alpha": 4, **train})


def moved(backbone: Backbone, train: TrainSection) -> Backbone:
    """As after some steps."""
    make_tunable(backbone, train)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in [p for p in backbone.model.parameters() if p.requires_grad]:
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    for layer in adapted_layers(backbone.model).values():
        layer.lora_dropout.eval()
    return backbone


def saved(folder: Path, tiny_folder: Path, train: TrainSection) -> tuple[Path, torch.Tensor]:
    """A MEDUSA-2 checkpoint, and the tuned backbone's hidden states."""
    backbone = moved(loaded(tiny_folder), train)
    heads = MedusaHeads(HeadsConfig(num_heads=3), hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size)
    save_checkpoint(
        folder, heads, paths=[(0,)], backbone_name="tiny", backbone_fingerprint=backbone.fingerprint,
        adapters=exported(backbone, train), dtype=torch.float32,
    )  # fmt: skip
    return folder, backbone.hidden_states(IDS).detach()


def configured(start: Path, **train: object) -> Config:
    section = settings(**train).model_copy(update={"init_from": str(start), "shards": 1})
    return Config(train=section)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_training_goes_on_from_a_tuned_backbone(tiny_folder: Path, tmp_path: Path, tune: str) -> None:
    start, want = saved(tmp_path / "heads", tiny_folder, settings(tune=tune))
    config = configured(start, tune=tune, lora_dropout=0.0)
    learner, _ = make_learner(config, loaded(tiny_folder), ROWS, data="x", rank=0, world=1)
    torch.testing.assert_close(learner.backbone.hidden_states(IDS).detach(), want)
    original = loaded(tiny_folder).hidden_states(IDS).detach()
    assert (original - want).abs().max() > 0.01
    if tune == "lora":
        with adapters_off(learner.backbone.model):
            assert torch.equal(learner.backbone.hidden_states(IDS).detach(), original)
    assert [p for p in learner.groups["backbone"] if not p.requires_grad] == []
    assert learner.groups["backbone"]


def test_another_rank_is_refused_with_the_settings_to_match(tiny_folder: Path, tmp_path: Path) -> None:
    start, _ = saved(tmp_path / "heads", tiny_folder, settings())
    with pytest.raises(ConfigError, match=r"lora of rank 2, alpha 4; .* rank 3, alpha 4"):
        make_learner(configured(start, lora_rank=3), loaded(tiny_folder), ROWS, data="x", rank=0, world=1)


def test_medusa1_refuses_heads_of_a_tuned_backbone(tiny_folder: Path, tmp_path: Path) -> None:
    start, _ = saved(tmp_path / "heads", tiny_folder, settings())
    with pytest.raises(ConfigError, match="heads of the original"):
        initial_heads(configured(start, method="medusa1"), loaded(tiny_folder))
