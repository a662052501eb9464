"""A tracking server out of reach costs a line and the metrics, not the work."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import pytest

from pipelines.config import load_config
from pipelines.job_log import JobLog


def test_without_its_server_a_job_goes_on_and_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as nobody:  # bound, and not listening
        nobody.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        config = load_config(None, [f"workdir={tmp_path}", f"registry.tracking_uri={uri}"])
        with caplog.at_level(logging.WARNING), JobLog(config, "distill-x", {"a": 1}) as log:
            log.metrics({"tokens": 1}, step=1)
    (record,) = [record for record in caplog.records if record.name == "pipelines.job_log"]
    assert record.getMessage().startswith("distill-x is not logged")
    assert "\n" not in record.getMessage()
    assert log.run_id is None
