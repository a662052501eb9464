from __future__ import annotations

import errno
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from medusa.checkpoint import load_checkpoint, save_checkpoint
from medusa.config import HeadsConfig
from medusa.errors import CheckpointError
from medusa.heads import MedusaHeads
from pipelines import folder_lock, train, train_loop
from pipelines.config import Config, TrainSection, load_config
from pipelines.engine import _memory_told
from pipelines.errors import StageError
from pipelines.folder_lock import alone_in
from pipelines.records import ANSWERS, TRAIN, Answers, read_answers, settled_answers
from pipelines.registry import folder_digest
from pipelines.tracking import Journal
from pipelines.train import _send_rest, _told
from pipelines.train_loop import Assignment


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


def _distilled(config: Config, *responses: list[int]) -> Path:
    rows = [
        {
            "id": str(n), "prompt_id": str(n), "source": "s", "part": TRAIN, "prompt_ids": [1], "response_ids": response,
            "response": "", "sampling": "{}", "backbone": "b",
        }
        for n, response in enumerate(responses)
    ]  # fmt: skip
    config.layout.distilled.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=ANSWERS), config.layout.distilled / "a.parquet")
    return config.layout.distilled


@pytest.mark.parametrize("name", ["tree.json", "config.json"])
def test_a_checkpoint_keeps_its_calibrated_tree_unless_it_is_damaged(name: str, tmp_path: Path) -> None:
    made, checkpoint = tmp_path / "made", tmp_path / "checkpoint"
    heads = MedusaHeads(HeadsConfig(num_heads=2), hidden_size=8, vocab_size=16)
    for folder, paths in ((made, [(0,)]), (checkpoint, [(0,), (0, 0)])):
        save_checkpoint(folder, heads, paths=paths, backbone_name="b", backbone_fingerprint="f")
    train._put(made, checkpoint)
    assert load_checkpoint(checkpoint).paths == [(0,), (0, 0)]
    for damage in (lambda file: file.write_text("{torn"), Path.unlink):
        damage(checkpoint / name)
        train._put(made, checkpoint)
        assert folder_digest(checkpoint) == folder_digest(made)


def test_no_run_begins_over_answers_that_are_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "_TIMEOUT_S", 0.05)
    config = load_config(None, [f"workdir={tmp_path}"])
    folder = _distilled(config, [2, 3])
    with alone_in(folder), pytest.raises(StageError, match=f"another run .* {folder}; wait"):
        train.run(config)
    assert settled_answers(folder, TRAIN) == read_answers(folder, TRAIN)


def test_nothing_is_distilled_while_a_run_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is started again would find other answers than its run is named after."""
    monkeypatch.setattr(folder_lock, "_TIMEOUT_S", 0.05)
    config = load_config(None, [f"workdir={tmp_path}"])
    folder = _distilled(config, [2, 3])
    met = []

    def begun(_: Config) -> None:
        with pytest.raises(StageError, match="another run is at work") as refused, alone_in(folder):
            pass
        met.append(refused)
        assert settled_answers(folder, TRAIN) == read_answers(folder, TRAIN)
        raise InterruptedError

    monkeypatch.setattr(train, "ray_session", begun)
    with pytest.raises(InterruptedError):
        train.run(config)
    assert met
    with alone_in(folder):
        pass


def test_looking_for_answers_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="run `distill` first"):
        train.run(load_config(None, [f"workdir={tmp_path / 'work'}"]))
    assert list(tmp_path.iterdir()) == []


def test_a_worker_trains_on_the_answers_that_its_run_is_named_after_or_not_at_all(tmp_path: Path) -> None:
    config = load_config(None, [f"workdir={tmp_path}"])
    answers = read_answers(_distilled(config, [2, 3]), TRAIN)
    task = Assignment(config="", data=answers.fingerprint, run_id="", tracking_uri="", card={})
    assert train_loop._answers(config, task) == answers
    _distilled(config, [2, 3], [4])
    with pytest.raises(StageError, match=rf"were {answers.fingerprint} when this run began"):
        train_loop._answers(config, task)


@pytest.mark.parametrize(
    ("settings", "has", "warned"),
    [
        ({"dtype": "bfloat16"}, False, True),
        ({"dtype": "bfloat16"}, True, False),
        ({"dtype": "bfloat16", "use_gpu": True}, False, False),
        ({}, False, False),
    ],
)
def test_a_processor_that_emulates_bfloat16_is_told_of(
    settings: dict[str, object],
    has: bool,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("medusa.linear.multiplies_bfloat16", lambda: has)
    train._warn_of_emulation(TrainSection.model_validate(settings))
    assert ("train.dtype=float32" in caplog.text) == warned
