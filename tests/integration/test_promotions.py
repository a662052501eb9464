"""Promotions at once from several machines: over SQLite, and over a real MLflow server on PostgreSQL."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from pipelines import promote
from pipelines.config import Config
from pipelines.evaluate import Comparison
from pipelines.listing import list_entries
from pipelines.registry import CHAMPION, VERSION_FOLDER, Version, folder_digest, open_registry
from pipelines.report import Evaluation, Figures
from pipelines.version_tags import TAG_EVALUATION
from tests import postgres_mlflow

AT_ONCE = 3
ONE = Figures(
    num_answers=1,
    num_tokens=21,
    num_steps=10,
    plain_step_s=0.01,
    tree_step_s=0.01,
    plain_tokens_per_s=50.0,
    tree_tokens_per_s=90.0,
)
EVALUATION = Evaluation(
    num_prompts=1,
    num_tokens=21,
    num_nodes=8,
    dtype="float32",
    device="cpu",
    acceleration_rate=2.0,
    plain_step_s=0.01,
    tree_step_s=0.01,
    plain_tokens_per_s=50.0,
    tree_tokens_per_s=90.0,
    num_differing=0,
    identity_checked=1,
    identity_differing=0,
    prompts_digest="p",
    checkpoint_digest="c",
)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def tracking(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of a registry of each kind."""
    folder = tmp_path_factory.mktemp("tracking")
    if request.param == "sqlite":
        yield f"sqlite:///{folder}/mlflow.db"
        return
    if (reason := postgres_mlflow.missing()) is not None:
        pytest.skip(reason)
    with (
        postgres_mlflow.postgres() as store,
        postgres_mlflow.mlflow_server(folder / "mlflow", store) as uri,
    ):
        yield uri


def _config(tracking: str, machine: Path, **promotion: Any) -> Config:
    """A machine's configuration: the registry is shared, no folder is."""
    return Config.model_validate({"workdir": machine, "registry": {"tracking_uri": tracking}, "promote": promotion})


def _register(config: Config, text: str) -> Version:
    registry, folder = open_registry(config), config.layout.root / "made"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(text)
    run_id = registry.run_for(text, {})
    source = registry.log_folder(run_id, folder, f"{VERSION_FOLDER}-{folder_digest(folder)}")
    return registry.add_version(run_id, source, {TAG_EVALUATION: EVALUATION.to_json()})


def _equal(challenger: Version, champion: Version) -> Comparison:
    """Both as good as each other, after a while in which others may come first."""
    time.sleep(0.2)
    return Comparison(challenger=ONE, champion=ONE, num_differing=0, dtype="float32", prompts_digest="p")


def _promote_one(tracking: str, machine: Path, number: int, gate: Any, told: Any) -> None:
    """What one machine does, in a process of its own."""
    try:
        config = _config(tracking, machine, version=number, lock_timeout_s=60)
        open_registry(config)
        gate.wait(timeout=300)
        result = promote.run(config, measure=_equal)
        told.put((result.champion, result.previous, ""))
    except BaseException as error:
        told.put((number, None, f"{type(error).__name__}: {error}"))
        raise


def test_promotions_at_once_all_count_and_come_back_in_order(tracking: str, tmp_path: Path) -> None:
    here = _config(tracking, tmp_path / "here")
    registry = open_registry(here)
    numbers = [_register(here, f"version {i}").number for i in range(AT_ONCE + 1)]
    first = promote.run(_config(tracking, tmp_path / "here", version=numbers[0]), measure=_equal)
    assert (first.champion, first.previous) == (numbers[0], None)

    context = multiprocessing.get_context("forkserver")  # imports once, forks often
    context.set_forkserver_preload([__name__, "mlflow"])
    gate, told = context.Barrier(AT_ONCE), context.Queue()
    workers = [
        context.Process(target=_promote_one, args=(tracking, tmp_path / f"machine-{n}", n, gate, told))
        for n in numbers[1:]
    ]
    for worker in workers:
        worker.start()
    outcomes = [told.get(timeout=400) for _ in workers]
    for worker in workers:
        worker.join(timeout=30)
    assert [error for *_, error in outcomes if error] == []

    # Every promotion that reported success stands in the order of champions, behind the one that it says it followed.
    champions = registry.champions()
    assert sorted(champions) == numbers
    assert {(new, old) for new, old, _ in outcomes} == set(zip(champions[1:], champions, strict=False))
    champion = registry.aliased(CHAMPION)
    assert champion is not None
    assert champion.number == champions[-1]
    assert {entry.version: entry.verdict for entry in list_entries(here)} == {
        new: f"passed beside version {old}" if old else "passed"
        for old, new in zip([None, *champions], champions, strict=False)
    }
    undone = [promote.rollback(here).champion for _ in champions[1:]]
    assert undone == champions[-2::-1]


def test_a_version_comes_back_whole_on_another_machine(tracking: str, tmp_path: Path) -> None:
    made = _register(_config(tracking, tmp_path / "here"), "carried")
    fetched = open_registry(_config(tracking, tmp_path / "there")).fetch(made)
    assert fetched.folder is not None
    assert (fetched.folder / "config.json").read_text() == "carried"


def test_the_command_line_lists_what_the_registry_holds(tracking: str, tmp_path: Path) -> None:
    made = _register(_config(tracking, tmp_path / "here"), "listed")
    arguments = ["registry", "list", "--json", f"workdir={tmp_path}", f"registry.tracking_uri={tracking}"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    newest = json.loads(done.stdout)[0]
    assert (newest["version"], newest["aliases"], newest["gate"]) == (made.number, [], None)
    assert newest["evaluation"]["speedup"] == pytest.approx(1.8)
