from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import medusa
from medusa.checkpoint import load_checkpoint, save_checkpoint
from medusa.tree_search import expected_tokens, grow_paths
from pipelines import calibrate, folder_lock
from pipelines.calibrate import CalibrateResult, SizeCost, draw, draw_tree, expected_by_size
from pipelines.config import Config
from pipelines.errors import StageError
from pipelines.folder_lock import alone_in
from pipelines.records import ANSWERS, CALIBRATION
from pipelines.registry import folder_digest
from tests.unit.medusa.tiny import random_heads

ACCURACY = (
    torch.rand(4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64).sort(1, descending=True).values
    / 4
)


def test_every_size_is_the_best_tree_of_that_size() -> None:
    paths = grow_paths(ACCURACY, 64)
    every = expected_by_size(ACCURACY, paths)
    assert len(every) == 64
    for nodes in (1, 2, 7, 33, 64):
        assert every[nodes - 1] == pytest.approx(expected_tokens(ACCURACY, grow_paths(ACCURACY, nodes)))
    gains = [later - earlier for earlier, later in itertools.pairwise(every)]
    assert gains == sorted(gains, reverse=True)


@pytest.mark.parametrize("nodes", [1, 2, 64])
def test_trees_and_curves_can_be_drawn(nodes: int, tmp_path: Path) -> None:
    paths = grow_paths(ACCURACY, nodes)
    assert draw_tree(tmp_path / "tree.png", paths, ACCURACY).stat().st_size > 1000
    curve = (SizeCost(nodes=1, expected_tokens=1.0, step_s=0.1),)
    assert draw(tmp_path / "curve.png", curve, 1, expected_by_size(ACCURACY, paths)).stat().st_size > 1000


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> Config:
    """A working directory as training leaves it: random heads without a tree of their own, and an answer to calibrate on."""
    made = Config.model_validate(
        {
            "workdir": tmp_path,
            "backbone": {"name": str(tiny_folder), "dtype": "float32"},
            "calibrate": {"sizes": [1, 4], "tokens_per_size": 4, "rounds": 1},
        }
    )
    model = medusa.load(tiny_folder, heads=None, dtype="float32")
    save_checkpoint(
        made.layout.checkpoint,
        random_heads(model.backbone),
        paths=[(0,)],
        backbone_name=model.backbone.name,
        backbone_fingerprint=model.backbone.fingerprint,
        dtype=torch.float32,
    )
    answer = model.generate([3, 4, 5], max_tokens=24, ignore_eos=True).token_ids
    row = {
        "id": "p", "prompt_id": "p", "source": "s", "part": CALIBRATION, "prompt_ids": [3, 4, 5], "response_ids": answer,
        "response": "", "sampling": json.dumps({"temperature": 0.0}), "backbone": model.backbone.fingerprint,
    }  # fmt: skip
    made.layout.distilled.mkdir()
    pq.write_table(pa.Table.from_pylist([row], schema=ANSWERS), made.layout.distilled / "a.parquet")
    return made


def _train_again(config: Config) -> None:
    """Other weights in the checkpoint's folder, as a training that ends puts them there."""
    checkpoint = load_checkpoint(config.layout.checkpoint)
    with torch.no_grad():
        next(checkpoint.heads.parameters()).add_(1.0)
    save_checkpoint(
        config.layout.checkpoint,
        checkpoint.heads,
        paths=checkpoint.paths,
        backbone_name=checkpoint.backbone_name,
        backbone_fingerprint=checkpoint.backbone_fingerprint,
    )


def test_answers_that_are_being_written_are_not_calibrated_on(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "_TIMEOUT_S", 0.05)
    with alone_in(config.layout.distilled), pytest.raises(StageError, match="another run is at work"):
        calibrate.run(config)


def test_the_same_weights_and_answers_get_the_same_tree_back_without_measuring(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = {file.name: file.read_bytes() for file in config.layout.checkpoint.iterdir()}
    first = calibrate.run(config)
    calibrated = folder_digest(config.layout.checkpoint)
    given = load_checkpoint(config.layout.checkpoint)
    assert (given.default_nodes, given.dtype) == (first.num_nodes, torch.float32)
    for name, content in trained.items():  # what a repeated `train` puts there
        (config.layout.checkpoint / name).write_bytes(content)

    class Measured(Exception):
        pass

    def load(*_: object) -> None:
        raise Measured

    monkeypatch.setattr(calibrate, "load_model", load)
    assert calibrate.run(config) == replace(first, measured_before=True)
    assert folder_digest(config.layout.checkpoint) == calibrated
    assert calibrate.is_current(config.layout)
    for changes in ({"again": True}, {"max_nodes": 5}):
        settings = config.calibrate.model_copy(update=changes)
        with pytest.raises(Measured):
            calibrate.run(config.model_copy(update={"calibrate": settings}))
    _train_again(config)
    assert not calibrate.is_current(config.layout)
    with pytest.raises(Measured):  # other weights
        calibrate.run(config)


def test_weights_that_were_not_measured_get_no_tree(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_cost = calibrate.measure_cost

    def while_a_training_ends(*args: Any) -> dict[int, float]:
        _train_again(config)
        return measure_cost(*args)

    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "measure_cost", while_a_training_ends)
        with pytest.raises(StageError, match="checkpoint changed while it was measured"):
            calibrate.run(config)
    assert not calibrate.is_current(config.layout)
    assert load_checkpoint(config.layout.checkpoint).default_nodes is None
    assert not calibrate.run(config).measured_before


def test_where_no_tree_pays_the_summary_says_what_would_help() -> None:
    curve = (SizeCost(nodes=1, expected_tokens=1.0, step_s=0.02), SizeCost(nodes=4, expected_tokens=1.01, step_s=0.03))
    result = CalibrateResult(checkpoint=Path("here"), plot=Path("plot"), curve=curve, num_nodes=1, num_positions=23)
    assert result.summary.startswith("plain decoding is fastest with here") and "train longer" in result.summary
    assert replace(result, num_nodes=4).summary.startswith(
        "tree of 4 nodes for here: 1.01 tokens expected a step of 30 ms"
    )


def test_without_trained_heads_calibration_names_the_stage_that_makes_them(config: Config) -> None:
    shutil.rmtree(config.layout.checkpoint)
    with pytest.raises(StageError, match=r"no checkpoint at .*; run `train` first"):
        calibrate.run(config)
