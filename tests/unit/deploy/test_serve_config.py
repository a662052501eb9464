"""The Serve configurations say what Ray Serve and the replica understand, and nothing that the code says differently."""

from __future__ import annotations

import asyncio
import importlib
import socket
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from deploy import serve
from deploy.replica import overlaid
from medusa.errors import MedusaError
from pipelines.config import Config, load_config
from pipelines.errors import ConfigError

FOLDER = Path(serve.__file__).parent
FILES = sorted(FOLDER.glob("serve*.yaml"))


CAUSE = "pipelines.errors.TrackingUnreachable: no MLflow server answers at http://h:9"


@pytest.mark.parametrize("end", ["", "\n  see the log", "\nHint: start one", "\nResponse: {}"])
def test_why_no_replica_came_up_is_its_own_error(end: str) -> None:
    wrapped = (
        "Deployment failed.\nray::Replica.__init__()\nRuntimeError: Traceback (most recent call last):\n  File y.py\n"
    )
    assert serve.cause_of(f"{wrapped}{CAUSE}{end}") == CAUSE
    assert serve.cause_of("TypeError: no\nNote: see") == "TypeError: no"
    assert serve.cause_of("it is\nlate") == "late"
    assert serve.cause_of("") == "Serve does not say why"


def test_what_is_served_is_told_in_words() -> None:
    tell = partial(serve.describe_served, alias="champion", registry="sqlite:///m.db")
    assert tell({"version": "champion-v3"}) == "champion-v3"
    assert tell({"version": "default"}) == (
        "the heads that come with the backbone: no version is 'champion' in sqlite:///m.db"
    )
    assert tell({"version": "champion-v2", "champion_error": "version 3 cannot be served: torn"}) == (
        "champion-v2: version 3 cannot be served: torn"
    )


@pytest.fixture
def deployment() -> dict[str, Any]:
    """Of the one-model configuration."""
    (application,) = yaml.safe_load((FOLDER / "serve.yaml").read_text())["applications"]
    (written,) = application["deployments"]
    return written


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_application_parses_with_rays_own_schema_and_ours(file: Path) -> None:
    tree = yaml.safe_load(file.read_text())
    schema = ServeDeploySchema.model_validate(tree)
    for application, written in zip(schema.applications, tree["applications"], strict=True):
        module, _, name = application.import_path.partition(":")
        assert getattr(importlib.import_module(module), name) is serve.build
        assert serve.build(application.args)._bound_deployment.name == application.deployments[0].name
        config = Config.model_validate(application.args)
        overlaid(config.serve, written["deployments"][0].get("user_config", {}))


def test_several_models_share_no_name_no_route_and_no_champion() -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load((FOLDER / "serve-two-models.yaml").read_text()))
    configs = [Config.model_validate(application.args) for application in schema.applications]
    assert len(configs) > 1
    for values in (
        [application.name for application in schema.applications],
        [application.route_prefix for application in schema.applications],
        [config.registry.model_name for config in configs],
    ):
        assert len(set(values)) == len(values)


def test_the_deployment_exists_and_agrees_with_the_codes_defaults(deployment: dict[str, Any]) -> None:
    assert deployment.pop("name") == serve.Replica.name
    assert deployment.pop("autoscaling_config") == serve.AUTOSCALING
    assert deployment.pop("ray_actor_options") == {"num_cpus": 1}
    user_config = deployment.pop("user_config")
    defaults = load_config(None).serve
    assert overlaid(defaults, user_config) == defaults
    config = serve.build({})._bound_deployment._deployment_config
    assert deployment == {name: getattr(config, name) for name in deployment}


def test_a_replica_may_take_as_long_to_leave_as_its_answers_to_end() -> None:
    application = serve.build({"serve": {"drain_s": 77}})
    assert application._bound_deployment._deployment_config.graceful_shutdown_timeout_s == 77


def test_a_relative_workdir_is_refused() -> None:
    """It would be relative to where Ray's workers live."""
    with pytest.raises(ConfigError, match="'medusa-demo' is relative"):
        serve.build({"workdir": "medusa-demo"})
    serve.build({"workdir": "~/medusa-demo"})


def test_scaling_is_decided_by_our_policy() -> None:
    assert AutoscalingConfig(**serve.AUTOSCALING).policy.policy_function == "deploy.autoscaling:SlotUsePolicy"


@pytest.mark.parametrize("settings", [{}, {"max_waiting": 300}, {"max_batch_size": 256}])
def test_serves_admission_lies_behind_the_engines(settings: dict[str, int]) -> None:
    """Else clients would see Serve's plain-text refusals."""
    admitted = load_config(None, [f"serve.{name}={value}" for name, value in settings.items()]).serve
    config = serve.build({"serve": settings})._bound_deployment._deployment_config
    for limit in (config.max_ongoing_requests, config.max_queued_requests):
        assert limit > admitted.max_batch_size + admitted.max_waiting


def test_a_user_config_that_admits_more_than_serve_lets_through_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def reconfigure(max_waiting: int, *args: str) -> str:
        host = SimpleNamespace(reconfigure=lambda given: None)
        replica = SimpleNamespace(_host=host, _settings=load_config(None, args).serve)
        caplog.clear()
        asyncio.run(serve.Replica.func_or_class.reconfigure(replica, {"max_waiting": max_waiting}))  # type: ignore[attr-defined]
        return caplog.text

    told = reconfigure(500)
    assert "user_config admits 508 requests" in told
    assert "lets 256 through" in told
    assert not reconfigure(200)
    assert not reconfigure(500, "serve.max_waiting=500")


def test_a_port_in_use_is_refused_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = load_config(None, [f"serve.port={port}"])
        with pytest.raises(MedusaError, match=f"127.0.0.1:{port}"), serve.serving(config):
            pass
