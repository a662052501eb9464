from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from medusa.errors import CheckpointError
from pipelines import folder_lock, train
from pipelines.config import TrainSection, load_config
from pipelines.engine import _memory_told
from pipelines.errors import StageError
from pipelines.folder_lock import alone_in
from pipelines.records import Answers
from pipelines.tracking import Journal
from pipelines.train import _send_rest, _told


class WorkersFailed(Exception):
    """As Ray Train tells of them: by rank."""

    def __init__(self, failure: Exception) -> None:
        super().__init__("worker group failed")
        self.worker_failures = {0: failure}


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (CheckpointError("heads of another backbone"), "^heads of another backbone$"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full.*goes on from the last checkpoint"),
        (RuntimeError("Task was killed due to the node running low on memory"), "lower train.batch_positions"),
        (RuntimeError("first line\nthe machine is gone"), "^training failed: the machine is gone"),
    ],
)
def test_a_workers_failure_is_one_line_that_says_what_to_do(failure: Exception, said: str) -> None:
    told = _told(WorkersFailed(failure), TrainSection())
    assert isinstance(told, StageError) and "\n" not in str(told)
    with pytest.raises(StageError, match=said):
        raise told


@pytest.mark.parametrize(
    ("method", "said"), [("medusa1", r"batch_positions \(1024\)"), ("medusa2", r"sequence_length \(1024\)")]
)
def test_a_step_that_does_not_fit_the_memory_says_what_to_lower(method: str, said: str) -> None:
    train = TrainSection.model_validate({"method": method})
    with pytest.raises(StageError, match=said), _memory_told(train):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(StageError, match=said), _memory_told(train):
        bytearray(2**60)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), _memory_told(train):
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_metrics_that_wait_are_told_without_the_servers_password(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal()
    journal.add(1, {"loss": 1.0})
    journal.save(tmp_path / "metrics.jsonl")
    config = load_config(None, [f"workdir={tmp_path}", "registry.tracking_uri=http://me:SECRET@there"])
    _send_rest(tmp_path / "metrics.jsonl", config, None)
    assert "http://***@there is back" in caplog.text and "SECRET" not in caplog.text


def test_two_runs_do_not_train_in_one_workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "_TIMEOUT_S", 0.05)
    monkeypatch.setattr(
        train, "read_answers", lambda *_: Answers(rows=(), backbone="b", sampling="{}", fingerprint="f")
    )
    monkeypatch.setattr(train, "ray_session", lambda _: pytest.fail("begun"))
    config = load_config(None, [f"workdir={tmp_path}"])
    with (
        alone_in(config.layout.training),
        pytest.raises(StageError, match=f"another run .* {config.layout.training}; wait"),
    ):
        train.run(config)
    with pytest.raises(pytest.fail.Exception, match="begun"):
        train.run(config)
