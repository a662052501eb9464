from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import Config, TrainSection
from pipelines.errors import ConfigError
from pipelines.train import check
from pipelines.zero import learning_rate, zero_config


@given(steps=st.integers(2, 300), warmup=st.integers(0, 200), final=st.floats(0, 1))
def test_the_rate_rises_to_its_peak_then_falls_to_its_share(steps: int, warmup: int, final: float) -> None:
    warmup = min(warmup, steps - 2)
    train = TrainSection(steps=steps, warmup_steps=warmup, lr_heads=1e-3, final_lr_share=final)
    rates = [learning_rate(train, step) for step in range(steps)]
    peak = max(warmup - 1, 0)
    assert rates[peak] == pytest.approx(1e-3)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3 * final)
    assert min(rates) >= 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dictionary_says_what_the_configuration_says(stage: int, dtype: str) -> None:
    train = TrainSection.model_validate({"zero_stage": stage, "dtype": dtype, "max_grad_norm": 0.7})
    found = zero_config(train, num_workers=3, on_gpu=False)
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
    ],
)
def test_contradictions_are_named_before_anything_starts(train: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check(Config.model_validate({"train": train}))
