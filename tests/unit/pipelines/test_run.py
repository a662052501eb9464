from __future__ import annotations

import pytest

from pipelines import run
from pipelines.config import load_config
from pipelines.errors import ConfigError
from pipelines.stage import Step


def test_stages_are_run_in_their_order_and_every_one_is_a_module() -> None:
    assert run.STAGES == ("distill", "train", "calibrate", "evaluate", "register", "promote")
    assert all(hasattr(getattr(run, name), "run") for name in run.STAGES)
    assert set(run.STAGES) <= set(run.RunResult.__dataclass_fields__)


def test_a_part_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run.first promote comes after run.last train"):
        run.run(load_config(None, ["run.first=promote", "run.last=train"]))
    with pytest.raises(ConfigError, match=r"run.first.*'trian'"):
        load_config(None, ["run.first=trian"])


def test_each_step_carries_the_name_of_its_stage() -> None:
    told: list[Step] = []
    with run.named(told.append)("train") as progress:
        progress(Step(done=1, total=2, note="steps"))
    assert told == [Step(done=1, total=2, note="steps (train)")]
