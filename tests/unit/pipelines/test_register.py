"""What is registered is one version with what belongs to it, whoever else registers at the same moment."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import medusa
from medusa.checkpoint import WEIGHTS, save_checkpoint
from pipelines import register
from pipelines.calibrate import RECORD
from pipelines.config import Config
from pipelines.errors import StageError
from pipelines.inputs import weights_digest
from pipelines.registry import CHALLENGER, Registry, folder_digest, open_registry
from pipelines.report import write_report
from pipelines.version_tags import TAG_DIGEST
from tests.unit.medusa.tiny import random_heads
from tests.unit.pipelines.test_promote import GOOD


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> Config:
    """A working directory with random heads that were evaluated."""
    made = Config.model_validate({"workdir": tmp_path, "backbone": {"name": str(tiny_folder), "dtype": "float32"}})
    backbone = medusa.load(tiny_folder, heads=None, dtype="float32").backbone
    save_checkpoint(
        made.layout.checkpoint,
        random_heads(backbone),
        paths=[(0,), (0, 0)],
        backbone_name=backbone.name,
        backbone_fingerprint=backbone.fingerprint,
        dtype=torch.float32,
    )
    evaluation = replace(GOOD, checkpoint_digest=folder_digest(made.layout.checkpoint))
    write_report(made.layout.evaluation, evaluation, [[1, 2]])
    return made


def test_who_registers_what_another_has_just_registered_finds_that_version(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload, others = Registry.log_folder, []

    def another_comes_first(*args: Any) -> str:
        monkeypatch.setattr(Registry, "log_folder", upload)
        others.append(register.run(config))
        return upload(*args)

    monkeypatch.setattr(Registry, "log_folder", another_comes_first)
    ours = register.run(config)
    (theirs,) = others
    assert (theirs.created, ours) == (True, replace(theirs, created=False))
    (version,) = open_registry(config).versions()
    assert (version.number, version.aliases) == (ours.version, (CHALLENGER,))


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"torn"), Path.unlink])
def test_registering_again_mends_what_was_damaged_where_it_is_stored(
    config: Config, damage: Callable[[Path], object]
) -> None:
    first = register.run(config)
    registry = open_registry(config)
    (version,) = registry.versions()
    stored = Path(version.source.removeprefix("file://"))
    damage(stored / WEIGHTS)
    with pytest.raises(StageError, match="came damaged"):
        registry.fetch(version)
    assert register.run(config) == replace(first, created=False)
    folder = registry.fetch(version).folder
    assert folder is not None
    assert folder_digest(folder) == version.tags[TAG_DIGEST]
    (stored / "left over").touch()
    with pytest.raises(StageError, match="stays so when it is stored again; delete it there"):
        register.run(config)


def test_what_is_stored_whole_is_not_stored_again(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    register.run(config)  # a replica may be fetching it at any moment
    monkeypatch.setattr(register, "_upload", lambda *_: pytest.fail("stored again"))
    assert not register.run(config).created


@pytest.mark.parametrize("own", [True, False])
def test_a_version_bears_the_calibration_of_its_own_weights_alone(own: bool, config: Config) -> None:
    weights = weights_digest(config.layout.checkpoint) if own else "of other heads"
    config.layout.calibration.mkdir()
    (config.layout.calibration / RECORD).write_text(json.dumps({"weights": weights}))
    registered = register.run(config)
    names = [item.path for item in open_registry(config)._client.list_artifacts(registered.run_id)]
    assert any(name.startswith("calibration-") for name in names) is own
