"""Replicas come, go, change and break on a real Ray Serve, under clients who must not notice. One tiny model, one session."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve
from ray.serve.schema import ServeDeploySchema

import medusa
from deploy.serve import AUTOSCALING, DEPLOYMENT, Replica
from medusa import Model
from medusa.checkpoint import WEIGHTS, save_checkpoint
from pipelines.cluster import ray_session
from pipelines.config import Config, load_config
from pipelines.registry import CHAMPION, VERSION_FOLDER, Registry, open_registry
from tests.local_cluster import free_ports, wait_until
from tests.unit.medusa.tiny import random_heads

pytestmark = pytest.mark.slow

APP = "under-test"
ASK: dict[str, Any] = {
    "model": "llama",
    "messages": [{"role": "user", "content": "Hello"}],
    "temperature": 0,
    "max_tokens": 200,
    "ignore_eos": True,
}
SCALING = AUTOSCALING | {
    "max_replicas": 2,
    "upscale_delay_s": 0.5,
    "downscale_delay_s": 1,
    "metrics_interval_s": 0.3,
    "look_back_period_s": 1,
}


class Breakable(Replica.func_or_class):  # type: ignore[name-defined,misc]
    """A replica whose engine thread can be broken from outside."""

    async def __init__(self, config: dict[str, Any]) -> None:
        await super().__init__(config)

    async def hang(self) -> None:
        self._host.loop._orders.put(lambda: time.sleep(3600))

    async def end(self) -> None:
        self._host.loop._orders.put(self._host.loop._stop)


def build_breakable(args: dict[str, Any]) -> serve.Application:
    return serve.deployment(Breakable, name=DEPLOYMENT).bind(Config.model_validate(args).model_dump(mode="json"))


@dataclass
class Served:
    """The application under test: where it answers, how it is deployed, its registry."""

    url: str
    config: Config
    plain: Model
    folder: Path
    registry: Registry
    run: str = field(init=False)

    def __post_init__(self) -> None:
        self.run = self.registry.run_for("test", {})

    def deploy(
        self,
        *overrides: str,
        build: str = "deploy.serve:build",
        replicas: int = 1,
        autoscaling: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """What `serve deploy` does with a file; returns when the application runs as it says."""
        config = load_config(None, [*_overrides(self.config), *overrides])
        deployment = {
            "name": DEPLOYMENT,
            "graceful_shutdown_wait_loop_s": 0.1,
            "health_check_period_s": 0.5,
            "user_config": {},
            "autoscaling_config": autoscaling or {"min_replicas": replicas, "max_replicas": replicas},
            **options,
        }
        application = {
            "name": APP, "route_prefix": "/", "import_path": build, "args": config.model_dump(mode="json"),
            "deployments": [deployment],
        }  # fmt: skip
        client = serve.context._get_global_client()
        client.deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))
        wait_until(lambda: serve.status().applications[APP].status == "RUNNING", timeout_s=240, what="the application")

    def crown(self, folder: Path) -> int:
        """Register a folder and make it champion; its version's number."""
        source = self.registry.log_folder(self.run, folder, f"{VERSION_FOLDER}-{folder.name}")
        number = self.registry.add_version(self.run, source, {}).number
        self.registry.set_alias(CHAMPION, number)
        return number

    def heads(self, name: str, *, seed: int) -> Path:
        backbone = self.plain.backbone
        return save_checkpoint(
            self.folder / name,
            random_heads(backbone, seed=seed),
            paths=[(0,), (1,), (0, 0), (0, 1)],
            backbone_name=backbone.name,
            backbone_fingerprint=backbone.fingerprint,
        )

    def ask(self, **fields: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json={**ASK, **fields}, timeout=120)

    def health(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/health", timeout=60).json()

    @property
    def replicas(self) -> set[str]:
        """Ids of those that run."""
        details = serve.context._get_global_client().get_serve_details()
        known = details["applications"][APP]["deployments"][DEPLOYMENT]["replicas"]
        return {replica["replica_id"] for replica in known if replica["state"] == "RUNNING"}


def _overrides(config: Config) -> list[str]:
    return [
        f"workdir={config.workdir}", f"backbone.name={config.backbone.name}", "backbone.dtype=float32",
        "serve.context_length=256", "serve.max_batch_size=4", "serve.follow_s=0.3", "ray.object_store_mb=100",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def served(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("replicas")
    config = load_config(None, [f"workdir={folder / 'work'}", f"backbone.name={tiny_folder}"])
    config = load_config(None, _overrides(config))
    (port,) = free_ports(1)
    with ray_session(config):
        serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
        try:
            yield Served(
                url=f"http://127.0.0.1:{port}",
                config=config,
                plain=medusa.load(tiny_folder, heads=None, dtype="float32"),
                folder=folder,
                registry=open_registry(config),
            )
        finally:
            serve.shutdown()


@contextmanager
def clients(served: Served, count: int) -> Iterator[list[httpx.Response]]:
    """`count` clients, each asking anew as soon as it is answered; what they were answered, complete after the block."""
    over, answers = threading.Event(), []

    def ask() -> None:
        while not over.is_set():
            answers.append(served.ask())

    with ThreadPoolExecutor(count) as pool:
        asking = [pool.submit(ask) for _ in range(count)]
        try:
            yield answers
        finally:
            over.set()
    for each in asking:
        each.result()


def expect(answers: list[httpx.Response], text: str) -> None:
    """None lost, none cut, none mixed up."""
    assert {answer.status_code for answer in answers} == {200}, [a.text for a in answers if a.status_code != 200][:3]
    assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {text}


@pytest.fixture(scope="module")
def text(served: Served) -> str:
    return served.plain.generate("Hello", max_tokens=200, ignore_eos=True).text


def test_replicas_grow_under_load_and_shrink_after(served: Served, text: str) -> None:
    served.crown(served.heads("v1", seed=1))
    served.deploy(autoscaling=SCALING)
    assert len(served.replicas) == 1
    with clients(served, 12) as answers:
        wait_until(lambda: len(served.replicas) == 2, timeout_s=120, what="a second replica")
        known = len(answers)
        wait_until(lambda: len(answers) > known + 24, timeout_s=120, what="answers from both")
    expect(answers, text)
    with clients(served, 1) as answers:  # a stream that goes on is no reason to keep both
        wait_until(lambda: len(served.replicas) == 1, timeout_s=120, what="one replica again")
    expect(answers, text)


def test_the_champion_is_followed_while_streams_go_on(served: Served, text: str) -> None:
    served.deploy()
    before = served.health()["version"]
    stay = served.replicas
    body = {**ASK, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=120) as response:
        lines = (line for line in response.iter_lines() if line)
        events = [next(lines)]
        number = served.crown(served.heads("v2", seed=2))
        events += lines
    assert events.pop() == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
    assert {chunk["system_fingerprint"].rpartition("_")[2] for chunk in chunks} == {before}

    newest = f"{CHAMPION}-v{number}"
    wait_until(lambda: served.health()["version"] == newest, timeout_s=60, what="the new champion")
    answer = served.ask()
    expect([answer], text)
    assert answer.json()["system_fingerprint"].endswith(newest)

    damaged = shutil.copytree(served.folder / "v2", served.folder / "damaged")
    (damaged / WEIGHTS).write_bytes(b"nothing")
    bad = served.crown(damaged)
    wait_until(lambda: "champion_error" in served.health(), timeout_s=60, what="word of the damaged champion")
    assert f"version {bad} cannot be served" in served.health()["champion_error"]
    answer = served.ask()
    expect([answer], text)
    assert answer.json()["system_fingerprint"].endswith(newest)
    assert served.replicas == stay
    served.registry.set_alias(CHAMPION, number)
    wait_until(lambda: "champion_error" not in served.health(), timeout_s=60, what="all well again")


def test_limits_change_without_a_new_replica(served: Served) -> None:
    stay = served.replicas
    served.deploy(user_config={"context_length": 64})
    assert served.replicas == stay
    assert httpx.get(f"{served.url}/v1/models").json()["data"][0]["max_model_len"] == 64


def test_a_rolling_update_fails_no_request(served: Served, text: str) -> None:
    served.deploy(replicas=2)
    wait_until(lambda: len(served.replicas) == 2, timeout_s=120, what="both replicas")
    old = served.replicas
    with clients(served, 6) as answers:
        wait_until(lambda: len(answers) > 12, timeout_s=60, what="answers before the update")
        served.deploy("serve.context_length=250", replicas=2)
        known = len(answers)
        wait_until(lambda: len(answers) > known + 12, timeout_s=60, what="answers after the update")
    expect(answers, text)
    assert not old & served.replicas
    assert httpx.get(f"{served.url}/v1/models").json()["data"][0]["max_model_len"] == 250


@pytest.mark.parametrize("fault", ["hang", "end"])
def test_a_replica_whose_engine_is_broken_is_replaced(served: Served, text: str, fault: str) -> None:
    served.deploy("serve.stall_after_s=2", build=f"{__name__}:build_breakable", health_check_period_s=2)
    (broken,) = served.replicas
    getattr(serve.get_deployment_handle(DEPLOYMENT, APP), fault).remote().result(timeout_s=30)
    caught = served.ask()  # a client who is there at that moment hears a clean error
    assert caught.status_code == 503
    assert caught.json()["error"]["type"] == "service_unavailable_error"
    wait_until(lambda: bool(served.replicas) and broken not in served.replicas, timeout_s=120, what="another replica")
    expect([served.ask()], text)
