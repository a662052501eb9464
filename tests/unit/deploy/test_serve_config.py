"""deploy/serve.yaml says what Ray Serve and the replica understand, and nothing that the code says differently."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deploy import serve
from medusa.errors import MedusaError
from pipelines.config import Config, load_config

FILE = Path(serve.__file__).parent / "serve.yaml"


@pytest.fixture
def tree() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def test_it_parses_with_rays_own_schema(tree: dict[str, Any]) -> None:
    schema = ServeDeploySchema.model_validate(tree)
    module, _, name = schema.applications[0].import_path.partition(":")
    assert getattr(importlib.import_module(module), name) is serve.build
    Config.model_validate(schema.applications[0].args)


def test_its_deployment_exists_and_agrees_with_the_codes_defaults(tree: dict[str, Any]) -> None:
    (written,) = tree["applications"][0]["deployments"]
    assert written.pop("name") == serve.Replica.name
    assert written.pop("autoscaling_config") == serve.AUTOSCALING
    config = serve.Replica._deployment_config
    assert written.pop("ray_actor_options") == {"num_cpus": 1}
    assert written == {name: getattr(config, name) for name in written}


def test_serves_admission_lies_behind_the_engines() -> None:
    """Else clients would see Serve's plain-text refusals."""
    assert serve.Replica.max_ongoing_requests > load_config(None).serve.max_batch_size + 64


def test_a_port_in_use_is_refused_before_anything_starts() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = load_config(None, [f"serve.port={port}"])
        with pytest.raises(MedusaError, match=f"127.0.0.1:{port}"), serve.serving(config):
            pass
