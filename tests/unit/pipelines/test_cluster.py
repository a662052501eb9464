from __future__ import annotations

import pytest

from pipelines.cluster import cluster_address
from pipelines.config import load_config
from pipelines.errors import ConfigError


def test_no_address_is_that_of_the_submitted_job_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster_address(load_config(None)) is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster_address(load_config(None)) == "10.0.0.1:6379"
    assert cluster_address(load_config(None, ["ray.address=local"])) is None
    assert cluster_address(load_config(None, ["ray.address=auto"])) == "auto"


def test_the_address_of_the_jobs_api_is_told_from_that_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS=http://127.0.0.1:8265 is not a node .*ray job submit"):
        cluster_address(load_config(None))
    with pytest.raises(ConfigError, match=r"ray.address=ray://\*\*\*@head:10001 is not a node"):
        cluster_address(load_config(None, ["ray.address=ray://me:SECRET@head:10001"]))
