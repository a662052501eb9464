from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pipelines import nodes
from pipelines.config import load_config
from pipelines.errors import ConfigError
from pipelines.nodes import _endpoint, reachable, refuse_job_copy, refuse_local_settings


def test_a_workdir_in_the_jobs_copy_of_the_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "working_dir_files" / "_ray_pkg_0123"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(ConfigError, match=r"workdir medusa-work would lie in the job's copy .* absolute path"):
        refuse_job_copy(load_config(None))
    refuse_job_copy(load_config(None, [f"workdir={tmp_path / 'kept'}"]))
    monkeypatch.chdir(tmp_path)
    refuse_job_copy(load_config(None))


def test_servers_are_known_by_host_and_port() -> None:
    assert _endpoint("http://mlflow:5000") == ("mlflow", 5000)
    assert _endpoint("https://mlflow.example/path") == ("mlflow.example", 443)
    assert _endpoint("postgresql://mlflow:5432/db") is None
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        assert reachable(address)
    assert not reachable(address)


def test_a_server_that_a_node_does_not_reach_is_named_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "alive", lambda: [{}, {}])
    monkeypatch.setattr(
        nodes, "_ask_nodes", lambda *_: {"far": nodes._Report(runs_code=True, sees_workdir=True, reaches_server=False)}
    )
    config = load_config(None, [f"workdir={tmp_path}", "registry.tracking_uri=http://me:SECRET@127.0.0.1:9"])
    with pytest.raises(ConfigError, match=r"http://\*\*\*@127\.0\.0\.1:9 is not reached from node far") as caught:
        refuse_local_settings(config)
    assert "SECRET" not in str(caught.value)
