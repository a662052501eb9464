"""The life cycle on real Ray, DeepSpeed and MLflow with a tiny random backbone. One Ray for the whole file."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import medusa
from medusa.checkpoint import load_checkpoint
from pipelines import calibrate, demo, distill, evaluate, promote, register, train
from pipelines.cluster import ray_session
from pipelines.config import Config, load_config
from pipelines.errors import ConfigError, StageError
from pipelines.records import CALIBRATION, TRAIN, answer_files, read_answers, scan
from pipelines.registry import folder_digest, open_registry
from pipelines.stage import Step
from pipelines.train import TAG_CHECKPOINT
from pipelines.version_tags import TAG_DIGEST
from tests.registered import champion_of

STEPS = 10
Configure = Callable[..., Config]


@pytest.fixture(scope="module")
def configure(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Configure:
    """A configuration over one working directory of this file, or over `workdir`, with overrides laid over it."""
    shared = tmp_path_factory.mktemp("life")

    def make(*overrides: str, workdir: Path = shared) -> Config:
        return load_config(
            None,
            [
                f"workdir={workdir}",
                f"backbone.name={tiny_folder}",
                "backbone.dtype=float32",
                "prompts.limit=12",
                "prompts.calibration_limit=3",
                "distill.heads=none",
                "distill.max_tokens=16",
                "distill.context_length=256",
                "distill.rows_per_file=5",
                "heads.num_heads=3",
                "train.init_from=none",
                f"train.steps={STEPS}",
                "train.warmup_steps=2",
                "train.lr_heads=0.02",
                "train.batch_positions=64",
                "train.shards=2",
                "train.holdout_share=0.2",
                "train.checkpoint_every=4",
                "train.log_every=1",
                "train.threads=1",
                "calibrate.sizes=[1, 4, 8]",
                "calibrate.tokens_per_size=8",
                "calibrate.rounds=1",
                "evaluate.num_prompts=3",
                "evaluate.max_tokens=16",
                "evaluate.identity_prompts=3",
                "promote.min_speedup=0.01",  # a tiny model's tree is slower than its plain decoding
                *overrides,
            ],
        )

    return make


@pytest.fixture(scope="module")
def _ray(configure: Configure) -> Iterator[None]:
    with ray_session(configure("ray.object_store_mb=128")):
        yield


@pytest.fixture(scope="module")
def distilled(configure: Configure, _ray: None) -> Path:
    config = configure()
    distill.run(config)
    return config.layout.distilled


@pytest.fixture(scope="module")
def trained(configure: Configure, distilled: Path) -> train.TrainResult:
    return train.run(configure("train.num_workers=2"))


def _ids(folder: Path) -> Counter[str]:
    return Counter(row["id"] for row in scan(folder, ["id"]))


def test_each_prompt_is_answered_exactly_once(configure: Configure, distilled: Path) -> None:
    assert _ids(distilled).total() == len(_ids(distilled)) == 15
    assert (len(read_answers(distilled, TRAIN).rows), len(read_answers(distilled, CALIBRATION).rows)) == (12, 3)


def test_answers_are_those_of_plain_greedy_decoding(configure: Configure, distilled: Path, tiny_folder: Path) -> None:
    model = medusa.load(tiny_folder, heads=None, dtype="float32")
    row = read_answers(distilled, TRAIN).rows[0]
    assert model.generate(row.prompt_ids, max_tokens=16).token_ids == row.response_ids


def test_a_rerun_answers_only_what_is_missing(configure: Configure, distilled: Path, tmp_path: Path) -> None:
    config = configure(workdir=tmp_path)
    assert distill.run(config).num_asked == 15
    before = {row["id"]: row["response_ids"] for row in scan(tmp_path / "distilled")}
    untouched = distill.run(config)
    assert (untouched.num_asked, untouched.num_done_before, untouched.num_answers) == (0, 15, 15)
    answer_files(tmp_path / "distilled")[1].unlink()
    steps: list[Step] = []
    assert 0 < distill.run(config, steps.append).num_asked < 15
    assert {row["id"]: row["response_ids"] for row in scan(tmp_path / "distilled")} == before
    assert _ids(tmp_path / "distilled").total() == 15
    assert steps[-1].done == steps[-1].total
    with pytest.raises(ConfigError, match="max_tokens"):
        distill.run(configure("distill.max_tokens=8", workdir=tmp_path))


def test_training_lowers_the_loss_and_leaves_a_checkpoint_with_its_origin(
    configure: Configure, trained: train.TrainResult
) -> None:
    registry = open_registry(configure())
    history = registry.history(trained.run_id, "loss")
    assert [step for step, _ in history] == list(range(1, STEPS + 1))
    assert history[-1][1] < history[0][1] - 0.05
    assert len(trained.top1) == 3
    card = load_checkpoint(trained.checkpoint).card
    assert card["Run"]["mlflow"] == trained.run_id
    assert card["Data"]["fingerprint"] == read_answers(configure().layout.distilled, TRAIN).fingerprint
    tags = registry._client.get_run(trained.run_id).data.tags
    assert folder_digest(Path(tags[TAG_CHECKPOINT])) == tags[TAG_DIGEST]


def test_a_finished_run_is_not_repeated(configure: Configure, trained: train.TrainResult) -> None:
    before = folder_digest(trained.checkpoint)
    again = train.run(configure("train.num_workers=2"))
    assert (again.run_id, again.steps) == (trained.run_id, STEPS)
    assert folder_digest(again.checkpoint) == before
    assert len(open_registry(configure()).history(trained.run_id, "loss")) == STEPS


def test_answers_of_another_backbone_are_refused_in_one_line(
    configure: Configure, distilled: Path, tmp_path: Path
) -> None:
    from tests.tiny_models import save_tiny_folder

    other = save_tiny_folder(tmp_path / "other", "llama", seed=1)
    config = configure(f"backbone.name={other}", "train.max_failures=0", workdir=tmp_path)
    with pytest.raises(StageError, match="distil again") as caught:
        train.run(_copy_answers(config, configure()))
    assert "\n" not in str(caught.value)


def test_from_checkpoint_to_champion(configure: Configure, trained: train.TrainResult) -> None:
    config = configure()
    with pytest.raises(StageError, match="evaluate"):
        register.run(config)
    curve = calibrate.run(config)
    assert [cost.nodes for cost in curve.curve] == [1, 4, 8]
    assert curve.plot.stat().st_size > 1000
    checkpoint = load_checkpoint(config.layout.checkpoint)
    assert checkpoint.default_nodes == curve.num_nodes
    assert checkpoint.tree().num_nodes == curve.num_nodes
    assert checkpoint.card["Run"]["mlflow"] == trained.run_id

    measured = evaluate.run(config)
    assert measured.evaluation.identity_checked == 3
    assert (measured.evaluation.num_differing, measured.evaluation.identity_differing) == (0, 0)
    assert measured.evaluation.acceleration_rate >= 1

    registered = register.run(config)
    assert (registered.created, registered.run_id) == (True, trained.run_id)
    assert register.run(config).version == registered.version
    assert promote.run(config).champion == registered.version
    champion = champion_of(config)
    assert champion is not None and champion.folder is not None
    assert folder_digest(champion.folder) == folder_digest(config.layout.checkpoint)
    medusa.load(config.backbone.name, heads=champion.folder, dtype="float32")

    calibrate.run(configure("calibrate.max_nodes=5"))
    with pytest.raises(StageError, match="run `evaluate`"):
        register.run(config)


def test_the_demo_goes_all_the_way_over_what_is_there(configure: Configure, trained: train.TrainResult) -> None:
    from rich.console import Console

    config = configure("train.num_workers=2", "promote.speedup_margin=0.9", "promote.acceleration_margin=0.9")
    result = demo.run(config, console=Console(quiet=True))
    assert result.promoted
    assert result.report.is_file()
    champion = champion_of(config)
    assert champion is not None and champion.number == result.version


def test_the_gate_compares_in_the_task_that_measure_on_asks_for(
    configure: Configure, distilled: Path, trained: train.TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver, which may have no device for a model, loads none."""

    def load(*_: object) -> None:
        raise AssertionError("a model in the driver")

    margins = ("promote.min_acceleration=0.01", "promote.acceleration_margin=0.9", "promote.speedup_margin=0.9")
    config = _copy_answers(configure("ray.measure_on={CPU: 1}", *margins, workdir=tmp_path), configure())
    shutil.copytree(trained.checkpoint, config.layout.checkpoint)
    registered = []
    for nodes in (8, 4):
        calibrate.run(configure(f"calibrate.max_nodes={nodes}", workdir=tmp_path))
        evaluate.run(config)
        registered.append(register.run(config).version)
        with monkeypatch.context() as patch:
            patch.setattr(evaluate, "load_model", load)
            promoted = promote.run(config)
    assert (promoted.previous, promoted.champion) == tuple(registered)
    assert promoted.comparison is not None
    assert promoted.comparison.num_differing == 0


def _copy_answers(config: Config, source: Config) -> Config:
    """Give a configuration's working directory the answers of another's."""
    config.layout.distilled.mkdir(parents=True)
    for file in answer_files(source.layout.distilled):
        (config.layout.distilled / file.name).write_bytes(file.read_bytes())
    return config
