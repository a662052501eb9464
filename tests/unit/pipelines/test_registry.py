"""What a registry stores comes back whole, and what MLflow says no to is one line."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow.artifacts
import pytest

from medusa.checkpoint import load_checkpoint
from medusa.pretrained import pretrained_heads
from pipelines import registry as registry_module
from pipelines import train
from pipelines.config import Config
from pipelines.errors import StageError, TrackingUnreachable
from pipelines.records import Answers
from pipelines.registry import Registry, Version, await_database, await_server, folder_digest, open_registry
from pipelines.version_tags import TAG_DIGEST


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config(workdir=tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="module")
def registry(config: Config) -> Registry:
    return open_registry(config)


@pytest.fixture
def gateway() -> Iterator[str]:
    """A proxy whose server is away."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(502)
            self.end_headers()
            self.wfile.write(b"<html>Bad Gateway</html>")

        do_POST = do_PATCH = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def _version(registry: Registry, folder: Path) -> Version:
    """A version of one file that is like no other."""
    folder.mkdir()
    (folder / "heads.safetensors").write_bytes(folder.name.encode() * 100)
    run_id = registry.run_for(folder.name, {})
    source = registry.log_folder(run_id, folder, "checkpoint")
    return registry.add_version(run_id, source, {TAG_DIGEST: folder_digest(folder)})


def test_a_version_that_comes_damaged_is_refused_and_not_kept(
    config: Config, registry: Registry, tmp_path: Path
) -> None:
    version = _version(registry, tmp_path / "whole")
    stored = Path(version.source.removeprefix("file://")) / "heads.safetensors"
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-7])
    with pytest.raises(StageError, match=rf"version {version.number} came damaged from .*registered was") as caught:
        registry.fetch(version)
    assert "\n" not in str(caught.value)
    assert list(config.layout.versions.iterdir()) == []
    stored.write_bytes(whole)
    folder = registry.fetch(version).folder
    assert folder is not None
    assert folder_digest(folder) == version.tags[TAG_DIGEST]


def test_a_version_made_by_hand_of_a_file_is_told(registry: Registry, tmp_path: Path) -> None:
    made = _version(registry, tmp_path / "folder")
    version = registry.add_version(made.run_id, f"{made.source}/heads.safetensors", {})
    with pytest.raises(StageError, match=rf"version {version.number} is a file, .*heads\.safetensors, not a folder"):
        registry.fetch(version)


def test_a_copy_that_was_damaged_here_is_fetched_again(registry: Registry, tmp_path: Path) -> None:
    version = _version(registry, tmp_path / "torn")
    folder = registry.fetch(version).folder
    assert folder is not None
    weights = folder / "heads.safetensors"
    for damage in (lambda: weights.write_bytes(b"torn"), weights.unlink, (folder / "left over").touch):
        damage()
        assert registry.fetch(version).folder == folder
        assert folder_digest(folder) == version.tags[TAG_DIGEST]


def test_of_two_who_find_the_same_copy_damaged_none_deletes_the_others_good_one(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = _version(registry, tmp_path / "torn twice")
    rmtree, download = shutil.rmtree, mlflow.artifacts.download_artifacts
    target = registry.fetch(version).folder
    assert target is not None
    (target / "heads.safetensors").write_bytes(b"torn")
    found, deleted = [], []
    both_have_come, both_delete, one_is_done = threading.Barrier(2), threading.Event(), threading.Event()

    def fetch() -> None:
        found.append(registry.fetch(version).folder)
        one_is_done.set()

    def at_once(**where: Any) -> str:
        got = download(**where)
        both_have_come.wait(30)
        return got

    def late(folder: Path, **options: Any) -> None:
        if folder == target:
            deleted.append(folder)
            if len(deleted) == 1:
                both_delete.wait(0.5)
            else:
                both_delete.set()
                one_is_done.wait(5)
        rmtree(folder, **options)

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", at_once)
    monkeypatch.setattr(shutil, "rmtree", late)
    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found, len(deleted)) == ([target, target], 1)
    assert folder_digest(target) == version.tags[TAG_DIGEST]


def test_a_version_is_read_through_once_when_it_comes_and_once_when_it_is_here(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, read = _version(registry, tmp_path / "read"), []

    def digest(folder: Path) -> str:
        read.append(folder)
        return folder_digest(folder)

    monkeypatch.setattr(registry_module, "folder_digest", digest)
    for _ in range(2):
        registry.fetch(version)
        assert len(read) == 1
        read.clear()


def test_versions_that_nobody_asked_for_in_a_day_make_room_but_for_the_last_few(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "_KEPT", 2)
    versions = [_version(registry, tmp_path / f"v{n}") for n in range(5)]
    folders: list[Path] = []
    for version in versions[:4]:
        folder = registry.fetch(version).folder
        assert folder is not None
        folders.append(folder)
    used = time.time()
    for age_s, folder in zip((3 * 86400, 2 * 86400, 3600, 7200), folders, strict=True):
        os.utime(folder, (used - age_s, used - age_s))
    registry.fetch(versions[1])  # asked for again
    registry.fetch(versions[4])
    assert [folder.is_dir() for folder in folders] == [False, True, True, True]


def test_an_experiment_that_was_deleted_is_one_line(registry: Registry, config: Config, tmp_path: Path) -> None:
    made = Config.model_validate(
        {"workdir": tmp_path, "registry": {"tracking_uri": registry.tracking_uri, "experiment": "gone"}}
    )
    experiment = open_registry(made)._experiment_id
    registry._client.delete_experiment(experiment)
    with pytest.raises(StageError, match=r"experiment gone was deleted.*registry\.experiment"):
        open_registry(made)


def test_a_run_that_was_deleted_is_no_run(registry: Registry) -> None:
    run_id = registry.run_for("doomed", {})
    assert registry.has_run(run_id)
    registry._client.delete_run(run_id)
    assert not registry.has_run(run_id)
    assert registry.run_of({"Run": {"mlflow": run_id}}, "digest") != run_id


def test_a_gateway_without_its_server_is_no_server(gateway: str) -> None:
    with pytest.raises(TrackingUnreachable, match="HTTP 502"):
        await_server(gateway, patience_s=0.0)


def test_a_database_that_does_not_answer_is_told_at_once_and_without_its_password(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(TrackingUnreachable, match=r"no database answers at .*127\.0\.0\.1:9.*refused") as caught:
        await_database("postgresql+psycopg2://me:SECRET@127.0.0.1:9/mlflow", patience_s=0.0)
    assert time.monotonic() - began < 30 and "SECRET" not in str(caught.value)
    await_database(f"sqlite:///{tmp_path}/any.db", patience_s=0.0)


def test_a_database_without_its_driver_is_told_by_the_drivers_name(tmp_path: Path) -> None:
    config = Config.model_validate(
        {"workdir": tmp_path / "work", "registry": {"tracking_uri": "mysql+nodriver://me:SECRET@host/mlflow"}}
    )
    with pytest.raises(StageError, match="nodriver") as caught:
        open_registry(config)
    with pytest.raises(StageError, match="needs the Python package 'MySQLdb'"):
        await_database("mysql://me:SECRET@host/mlflow", patience_s=0.0)
    assert "SECRET" not in str(caught.value) and not (tmp_path / "work").exists()


def test_a_server_that_dies_in_mid_run_is_out_of_reach(gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    client = registry_module._opened(gateway)
    with pytest.raises(TrackingUnreachable, match="502"):
        client.set_terminated("run")
    with pytest.raises(TrackingUnreachable, match=r"127\.0\.0\.1:9"):
        registry_module._opened("http://127.0.0.1:9").set_terminated("run")


class Dies:
    """A registry whose server, or database, is away when the run ends."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def tag_run(self, run_id: str, tags: dict[str, str]) -> None:
        raise self.error

    end_run = tag_run


@pytest.mark.parametrize(
    ("uri", "error"),
    [("http://there", TrackingUnreachable("the registry fails")), (None, StageError("the registry fails"))],
)
def test_what_mlflow_does_at_the_end_neither_undoes_a_training_nor_hides_its_error(
    uri: str | None, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config.model_validate({"workdir": tmp_path, "registry": {"tracking_uri": uri}})
    monkeypatch.setattr("pipelines.tracking._WAIT_S", 0.001)
    tracked: Any = (Dies(error), "run")
    train._end(config, tracked, failed=False)
    train._end(config, tracked, failed=True)
    assert caplog.text.count("the registry fails") == 2


def test_a_run_tells_the_shape_of_the_heads_that_it_trains(registry: Registry, config: Config) -> None:
    answers = Answers(rows=(), backbone="b", sampling="{}", fingerprint="f")
    tracked = train._track(config, "shaped", answers, train.initial_shape(config))
    assert tracked is not None
    params = registry._client.get_run(tracked[1]).data.params
    shipped = load_checkpoint(pretrained_heads(config.backbone.name)).heads.config
    assert {name: params[f"heads.{name}"] for name in vars(shipped)} == {n: str(v) for n, v in vars(shipped).items()}


def test_a_finished_run_says_where_its_last_checkpoint_lies(registry: Registry, config: Config) -> None:
    run_id = registry.run_for("trained", {})
    train._end(config, (registry, run_id), tags={train.TAG_CHECKPOINT: "/somewhere/heads", TAG_DIGEST: "abc"})
    run: SimpleNamespace = registry._client.get_run(run_id)
    assert (run.data.tags[train.TAG_CHECKPOINT], run.data.tags[TAG_DIGEST]) == ("/somewhere/heads", "abc")
    assert run.info.status == "FINISHED"
