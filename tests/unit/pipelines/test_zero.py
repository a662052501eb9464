from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa.config import HeadsConfig
from medusa.pretrained import pretrained_heads
from pipelines.config import Config, TrainSection, dump_config, load_config
from pipelines.errors import ConfigError
from pipelines.records import Answers
from pipelines.train import check, initial_shape, run_name
from pipelines.zero import lambda0, learning_rates, zero_config


@given(steps=st.integers(2, 300), warmup=st.integers(0, 200), final=st.floats(0, 1))
def test_the_rate_rises_to_its_peak_then_falls_to_its_share(steps: int, warmup: int, final: float) -> None:
    warmup = min(warmup, steps - 2)
    train = TrainSection(steps=steps, warmup_steps=warmup, lr_heads=1e-3, final_lr_share=final)
    rates = [learning_rates(train, step)["heads"] for step in range(steps)]
    peak = max(warmup - 1, 0)
    assert rates[peak] == pytest.approx(1e-3)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3 * final)
    assert min(rates) >= 0


def test_all_of_the_heads_learn_a_fixed_multiple_of_the_backbones_rate() -> None:
    train = TrainSection(method="medusa2", steps=100, warmup_steps=10, lr_backbone=1e-4, lr_ratio=4)
    for step in range(100):
        rates = learning_rates(train, step)
        assert rates["heads"] == pytest.approx(4 * rates["backbone"])
    assert learning_rates(train, 9)["backbone"] == pytest.approx(1e-4)


def test_lambda0_is_constant_or_rises_along_a_sine() -> None:
    constant = TrainSection(method="medusa2", steps=11, warmup_steps=1, lambda0=0.2)
    assert {lambda0(constant, step) for step in range(11)} == {0.2}
    sine = TrainSection(method="medusa2", steps=11, warmup_steps=1, lambda0=0.01, lambda0_schedule="sine")
    weights = [lambda0(sine, step) for step in range(11)]
    assert weights[0] == 0 and weights == sorted(weights)
    assert weights[5] == pytest.approx(0.01 * 0.5**0.5) and weights[10] == pytest.approx(0.01)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dictionary_says_what_the_configuration_says(stage: int, dtype: str) -> None:
    train = TrainSection.model_validate({"zero_stage": stage, "dtype": dtype, "max_grad_norm": 0.7})
    found = zero_config(train, num_workers=3, on_gpu=False, micro_batches=2)
    assert found["zero_optimization"]["stage"] == stage
    assert found["bf16"]["enabled"] is (dtype == "bfloat16")
    assert found["gradient_clipping"] == 0.7
    micro, accumulated = found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]
    assert found["train_batch_size"] == micro * accumulated * 3


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ({"num_workers": 2, "shards": 3}, "shards"),
        ({"num_workers": 3, "batch_positions": 64}, "batch_positions"),
        ({"steps": 10, "warmup_steps": 10}, "warmup_steps"),
        ({"init_from": "/no/such/folder"}, "/no/such/folder"),
        ({"method": "medusa2", "shards": 3}, "batch_sequences"),
        ({"method": "medusa2", "soft_labels": 4}, "soft_labels"),
        ({"method": "medusa2", "tune": "qlora"}, "qlora needs bitsandbytes"),
    ],
)
def test_contradictions_are_named_before_anything_starts(train: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check(Config.model_validate({"train": train}))


def test_a_run_does_not_begin_from_the_folder_that_it_writes(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    config = Config.model_validate({"workdir": tmp_path, "train": {"init_from": str(tmp_path / "checkpoint")}})
    with pytest.raises(ConfigError, match="copy the folder"):
        check(config)


@pytest.mark.parametrize(
    ("overrides", "shape"),
    [
        ([], HeadsConfig(num_layers=2, kind="hydra")),
        (["heads.kind=hydra", "heads.num_heads=5"], HeadsConfig(num_layers=2, kind="hydra")),
        (["train.init_from=plain"], HeadsConfig(num_layers=2)),
        (["train.init_from=none"], HeadsConfig()),
        (["train.init_from=none", "heads.kind=hydra", "heads.num_heads=3"], HeadsConfig(num_heads=3, kind="hydra")),
    ],
)
def test_heads_begin_with_their_own_shape_and_fresh_ones_with_the_configured(
    overrides: list[str], shape: HeadsConfig, tmp_path: Path
) -> None:
    config = load_config(None, overrides)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    carried = Config.model_validate_json(config.model_dump_json())
    assert [initial_shape(one) for one in (config, load_config(tmp_path / "again.yaml"), carried)] == [shape] * 3


@pytest.mark.parametrize(("name", "value", "has"), [("num_heads", "3", "5"), ("kind", "medusa", "hydra")])
def test_a_shape_that_the_heads_to_go_on_from_do_not_have_is_refused(name: str, value: str, has: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"heads\.{name} {value} .*train\.init_from default have {has}: .*train\.init_from=none"
    ):
        initial_shape(load_config(None, [f"heads.{name}={value}"]))


def test_a_backbone_without_shipped_heads_is_told_how_to_begin(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no heads come with .* 'default' .*set train\.init_from=none"):
        initial_shape(load_config(None, [f"backbone.name={tmp_path}"]))


def test_a_runs_name_tells_what_shapes_it_and_nothing_else() -> None:
    answers = Answers(rows=(), backbone="b", sampling="{}", fingerprint="f")

    def name(**train: object) -> str:
        return run_name(Config.model_validate({"train": train}), answers)

    assert name(log_every=7, cache_quota_gb=0.0, lr_backbone=0.1) == name(), "MEDUSA-1 has no use for the last"
    assert name(num_workers=2) == name(num_workers=2, shards=2) != name()
    tuned = {name(method="medusa2", **more) for more in ({}, {"lora_rank": 4}, {"lr_ratio": 2.0}, {"lambda0": 0.1})}
    assert len(tuned | {name(), name(soft_labels=4), name(lr_heads=0.1)}) == 7


def test_a_runs_name_tells_what_is_in_the_heads_that_it_goes_on_from_not_what_they_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = Answers(rows=(), backbone="b", sampling="{}", fingerprint="f")

    def name(init_from: str) -> str:
        return run_name(Config.model_validate({"train": {"init_from": init_from}}), answers)

    shipped = pretrained_heads("smollm2-135m")
    assert name("default") == name("hydra") == name(str(shipped)) != name("plain")
    before, fresh = name("default"), name("none")
    monkeypatch.setattr("medusa.pretrained.ROOT", tmp_path)
    shutil.copytree(shipped, tmp_path / shipped.name)
    assert name("default") == before
    (tmp_path / shipped.name / "medusa_heads.safetensors").write_bytes(b"those of the next release")
    assert name("default") != before and name("none") == fresh
