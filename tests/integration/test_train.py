"""Training on real Ray, DeepSpeed and MLflow with a tiny random backbone: MEDUSA-2, and what goes wrong on the way."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import medusa
from medusa.backbone import load_backbone
from medusa.checkpoint import WEIGHTS, load_checkpoint, save_checkpoint
from pipelines import train, train_loop
from pipelines.cluster import ray_session
from pipelines.config import Config, load_config
from pipelines.errors import StageError
from pipelines.records import ANSWERS, TRAIN, read_answers
from pipelines.registry import folder_digest, open_registry

STEPS, STOP = 8, 5  # a checkpoint every 3 steps: whoever is lost in step 5 goes on from 3
Configure = Callable[..., Config]
MARKER = "MEDUSA_TEST_MARKER"


@pytest.fixture(scope="module")
def configure(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Configure:
    """A configuration over a working directory that holds answers, with overrides laid over it."""
    shared = tmp_path_factory.mktemp("train")

    def make(*overrides: str, workdir: Path = shared) -> Config:
        config = load_config(
            None,
            [
                f"workdir={workdir}", f"backbone.name={tiny_folder}", "backbone.dtype=float32", "heads.num_heads=3",
                "ray.object_store_mb=128", "train.init_from=none", f"train.steps={STEPS}", "train.warmup_steps=2",
                "train.shards=2", "train.holdout_share=0.2", "train.checkpoint_every=3", "train.log_every=1",
                "train.threads=1", "train.batch_positions=64", "train.lr_heads=0.02", "train.lr_backbone=0.002",
                "train.batch_sequences=4", "train.sequence_length=48", *overrides,
            ],
        )  # fmt: skip
        if not config.layout.distilled.is_dir():
            _write_answers(config)
        return config

    return make


def _write_answers(config: Config) -> None:
    """Answers that no model gave; the tiny backbone's own would be as random."""
    fingerprint = load_backbone(config.backbone.name, dtype="float32", fused=False).fingerprint
    rows = [
        {
            "id": f"{n:02}", "prompt_id": f"{n:02}", "source": "test", "part": TRAIN, "prompt_ids": [n + 3] * (2 + n % 3),
            "response_ids": [(n * 17 + i * i * 5) % 290 + 3 for i in range(6 + n % 9)], "response": "",
            "finish_reason": "length", "sampling": "{}", "backbone": fingerprint, "error": None,
        }
        for n in range(24)
    ]  # fmt: skip
    config.layout.distilled.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=ANSWERS), config.layout.distilled / "part-0.parquet")


@pytest.fixture(scope="module", autouse=True)
def _ray(configure: Configure) -> Iterator[None]:
    with ray_session(configure()):
        yield


JOINT = ("train.method=medusa2", "train.lora_rank=2", "train.lora_alpha=4")


@pytest.fixture(scope="module")
def tuned(configure: Configure) -> train.TrainResult:
    return train.run(configure(*JOINT))


@pytest.fixture(scope="module")
def untracked(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> tuple[train.TrainResult, list[str]]:
    """A MEDUSA-1 run that no tracking server heard of, with the warnings that it gave."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pipelines").addHandler(handler)
    away = configure("registry.tracking_uri=http://127.0.0.1:9", workdir=tmp_path_factory.mktemp("heads"))
    try:
        return train.run(away), told
    finally:
        logging.getLogger("pipelines").removeHandler(handler)


def _losses(config: Config, run_id: str, metric: str = "loss") -> dict[int, float]:
    """Step → what was logged of it last."""
    return dict(open_registry(config).history(run_id, metric))


def _same(first: Path, second: Path) -> None:
    """Equal to bfloat16's last place, in which they are stored; and moved from where they began."""
    one, two = load_checkpoint(first), load_checkpoint(second)
    pairs = [(dict(one.heads.named_parameters()), dict(two.heads.named_parameters()))]
    if one.adapters is not None and two.adapters is not None:
        pairs.append((one.adapters.tensors, two.adapters.tensors))  # type: ignore[arg-type]
    assert (one.adapters is None) == (two.adapters is None)
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            torch.testing.assert_close(weight, theirs[name], rtol=2e-2, atol=2e-4, msg=name)
    assert max(float(weight.detach().abs().max()) for weight in pairs[0][0].values()) > 0.01


def test_medusa2_learns_and_its_tree_decodes_what_its_tuned_backbone_decodes(
    configure: Configure, tuned: train.TrainResult, tiny_folder: Path
) -> None:
    config = configure()
    losses = _losses(config, tuned.run_id)
    assert list(losses) == list(range(1, STEPS + 1))
    heads = [_losses(config, tuned.run_id, f"loss_head{k}") for k in (1, 2, 3)]
    assert all(head[STEPS] < head[1] - 0.05 for head in heads)
    drift = _losses(config, tuned.run_id, "loss_lm")
    assert drift[1] == pytest.approx(0, abs=1e-5) and drift[STEPS] > 1e-5, "the backbone starts as itself, then moves"
    rates = [_losses(config, tuned.run_id, f"lr_{group}") for group in ("heads", "backbone")]
    assert all(rates[0][step] == pytest.approx(4 * rates[1][step]) for step in losses)
    for metric in ("grad_norm", "tokens_per_s", "lambda0", "top1_head1", "top5_head3"):
        assert _losses(config, tuned.run_id, metric), metric
    assert len(tuned.top1) == 3

    model = medusa.load(tiny_folder, heads=tuned.checkpoint, dtype="float32")
    assert model.checkpoint is not None and model.checkpoint.adapters is not None
    plainly = medusa.Model(model.backbone, None)
    untuned = medusa.load(tiny_folder, heads=None, dtype="float32")
    prompts = [[n + 3] * 4 for n in range(6)]
    answers, own, before = (
        [answer.token_ids for answer in m.generate(prompts, max_tokens=24, ignore_eos=True)]
        for m in (model, plainly, untuned)
    )
    assert answers == own
    assert answers != before


def test_a_run_says_where_it_comes_from(configure: Configure, tuned: train.TrainResult) -> None:
    config = configure()
    run = open_registry(config)._client.get_run(tuned.run_id)
    answers = read_answers(config.layout.distilled, TRAIN)
    for name, value in {
        "data": answers.fingerprint,
        "backbone_fingerprint": answers.backbone,
        "method": "medusa2",
    }.items():
        assert run.data.params[name] == value
    assert run.data.params["git_revision"]
    assert run.info.status == "FINISHED"


def test_a_finished_run_gives_its_heads_again_and_leaves_their_tree_as_calibration_chose_it(
    configure: Configure, tuned: train.TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, made = configure(*JOINT), load_checkpoint(tuned.checkpoint)
    save_checkpoint(
        tuned.checkpoint, made.heads, paths=[(0,), (1,), (0, 0)], default_nodes=3, backbone_name=made.backbone_name,
        backbone_fingerprint=made.backbone_fingerprint, adapters=made.adapters, card=made.card, dtype=made.dtype,
    )  # fmt: skip
    calibrated = folder_digest(tuned.checkpoint)
    assert train.run(config).run_id == tuned.run_id
    assert folder_digest(tuned.checkpoint) == calibrated

    def status() -> str:
        return str(open_registry(config)._client.get_run(tuned.run_id).info.status)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tuned.checkpoint / WEIGHTS).unlink()
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copytree", full_disk)
        with pytest.raises(OSError, match="No space left"):
            train.run(config)
    assert status() == "FAILED"
    train.run(config)
    assert status() == "FINISHED"
    _same(tuned.checkpoint, Path(open_registry(config)._client.get_run(tuned.run_id).data.tags[train.TAG_CHECKPOINT]))


def test_a_tracking_server_out_of_reach_costs_a_warning_and_no_metrics(
    configure: Configure, untracked: tuple[train.TrainResult, list[str]]
) -> None:
    result, told = untracked
    assert (result.run_id, result.steps) == ("", STEPS)
    assert len([line for line in told if "http://127.0.0.1:9 is out of reach" in line]) == 1
    back = configure(workdir=result.checkpoint.parent)
    again = train.run(back)
    assert again.run_name == result.run_name
    assert list(_losses(back, again.run_id)) == list(range(1, STEPS + 1))
    assert _losses(back, again.run_id, "top1_head1")


def lose_the_worker(settings: dict[str, Any]) -> str | None:
    """A worker that the machine kills once, two steps after its checkpoint."""
    return _at_the_stop(settings, lambda: os.kill(os.getpid(), signal.SIGKILL))


def wait_to_be_killed(settings: dict[str, Any]) -> str | None:
    """A worker that goes no further, so that its driver can be killed in the middle of a run."""
    return _at_the_stop(settings, lambda: time.sleep(600))


def break_one_rank(settings: dict[str, Any]) -> str | None:
    """Hidden states of the second worker turn into NaN; the marker lies in the other tests' way alone."""
    from pipelines.learner import HeadsLearner

    real = HeadsLearner.micro_batches

    def micro_batches(self: HeadsLearner, step: int) -> Any:
        batches = real(self, step)
        if step == STOP and 1 in self._lanes:
            batches[0].data.hidden.fill_(float("nan"))
        return batches

    HeadsLearner.micro_batches = micro_batches  # type: ignore[method-assign]
    try:
        return train_loop.train_loop(settings)
    finally:
        HeadsLearner.micro_batches = real  # type: ignore[method-assign]


def _at_the_stop(settings: dict[str, Any], act: Callable[[], object]) -> str | None:
    from pipelines.engine import TrainEngine

    marker = Path(settings["card"]["Marker"])
    real = TrainEngine.step

    def step(self: TrainEngine, number: int) -> Any:
        if number == STOP and not marker.exists() and self.rank == self.world - 1:
            time.sleep(0.3)  # the checkpoint's report is on its way through Ray
            marker.touch()
            act()
        return real(self, number)

    TrainEngine.step = step  # type: ignore[method-assign]
    try:
        return train_loop.train_loop(settings)
    finally:
        TrainEngine.step = real  # type: ignore[method-assign]


def test_a_run_that_lost_its_worker_ends_as_if_it_had_not(
    configure: Configure,
    untracked: tuple[train.TrainResult, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    marker = tmp_path / "failed-once"
    monkeypatch.setattr(train_loop, "describe", lambda *_: {"Marker": str(marker)})
    monkeypatch.setattr(train_loop, "train_loop", lose_the_worker)
    config = configure("train.max_failures=1", workdir=tmp_path / "work")
    result = train.run(config)
    assert marker.exists()
    _same(result.checkpoint, untracked[0].checkpoint)
    assert result.top5 == pytest.approx(untracked[0].top5, abs=0.05)
    told = Counter(step for step, _ in open_registry(config).history(result.run_id, "loss"))
    assert told.keys() == set(range(1, STEPS + 1))


def drive(config: str, marker: str) -> None:
    """The driver that is killed: a process of its own, with a Ray of its own."""
    train_loop.describe = lambda *_: {"Marker": marker}  # type: ignore[assignment]
    real, train_loop.train_loop = train_loop.train_loop, wait_to_be_killed  # type: ignore[assignment]
    assert real is not wait_to_be_killed
    train.run(Config.model_validate_json(config))


def test_a_run_whose_driver_was_killed_goes_on_with_the_same_command(
    configure: Configure, tuned: train.TrainResult, tmp_path: Path
) -> None:
    marker = tmp_path / "waiting"
    config = configure(*JOINT, workdir=tmp_path / "work")
    script = "import sys; from tests.integration.test_train import drive; drive(*sys.argv[1:])"
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(
            [sys.executable, "-c", script, config.model_dump_json(), str(marker)],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 400
        while not marker.exists():
            assert driver.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.2)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    result = train.run(config)
    assert result.run_name == tuned.run_name
    assert len(open_registry(config)._client.search_runs([open_registry(config)._experiment_id])) == 1
    _same(result.checkpoint, tuned.checkpoint)
    resumed, whole = _losses(config, result.run_id), _losses(configure(), tuned.run_id)
    assert resumed == pytest.approx(whole, rel=1e-3)


def test_a_loss_that_is_not_a_number_stops_the_run_with_step_rank_and_last_good_checkpoint(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_loop, "train_loop", break_one_rank)
    config = configure("train.num_workers=2", workdir=tmp_path)
    with pytest.raises(
        StageError, match=rf"step {STOP + 1}: .* on rank 1; .* last good checkpoint is that of step 3: "
    ) as told:
        train.run(config)
    good = Path(str(told.value).rpartition(": ")[2]) / train_loop.HEADS
    assert load_checkpoint(good).card["Training"]["steps done"] == 3
