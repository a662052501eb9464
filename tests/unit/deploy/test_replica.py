"""A replica's contents without Ray: a new version is served beside the old, answers of each its own to the last token."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

import medusa
from deploy import answering
from deploy.api_keys import KeyFileError, KeyRing, hash_key
from deploy.app import create_app
from deploy.heads import successor
from deploy.replica import ModelHost
from deploy.service import Service
from medusa import Model
from medusa.adapters import Adapters
from medusa.checkpoint import WEIGHTS, save_checkpoint
from medusa.errors import CheckpointError
from pipelines.config import Config, ServeSection, load_config
from pipelines.errors import ConfigError
from pipelines.registry import VERSION_FOLDER, Registry, Version, open_registry
from tests.unit.deploy.conftest import http_server, wait_until
from tests.unit.medusa.tiny import random_heads

ASK = {"model": "llama", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 24}


def adapters_of(model: Model) -> Adapters:
    """LoRA that changes what the backbone says."""
    name = "model.layers.1.mlp.down_proj"
    outputs, inputs = model.backbone.model.get_parameter(f"{name}.weight").shape
    generator = torch.Generator().manual_seed(3)
    return Adapters(
        kind="lora",
        tensors={
            f"{name}.lora_A.weight": torch.randn(2, inputs, generator=generator),
            f"{name}.lora_B.weight": torch.randn(outputs, 2, generator=generator),
        },
        rank=2,
        alpha=4.0,
    )


@pytest.fixture(scope="session")
def save_heads(model: Model) -> Callable[..., Path]:
    def save(folder: Path, *, seed: int = 1, tuned: bool = False) -> Path:
        return save_checkpoint(
            folder,
            random_heads(model.backbone, seed=seed),
            paths=[(0,), (1,), (0, 0), (0, 1)],
            backbone_name=model.backbone.name,
            backbone_fingerprint=model.backbone.fingerprint,
            adapters=adapters_of(model) if tuned else None,
            dtype=torch.float32,
        )

    return save


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> Config:
    return load_config(
        None,
        [
            f"workdir={tmp_path}", f"backbone.name={tiny_folder}", "backbone.dtype=float32",
            "serve.context_length=256", "serve.max_batch_size=4", "serve.follow_s=0",
        ],
    )  # fmt: skip


def serving_with(config: Config, **settings: Any) -> Config:
    return config.model_copy(update={"serve": config.serve.model_copy(update=settings)})


def _app(service: Service, settings: ServeSection, keys: KeyRing) -> Any:
    return create_app(service, settings, keys=keys)


@dataclass
class Champions:
    """A registry whose champions a test crowns, and where their files lie."""

    registry: Registry
    root: Path

    def add(self, folder: Path) -> int:
        run = self.registry.run_for("test", {})
        source = self.registry.log_folder(run, folder, f"{VERSION_FOLDER}-{folder.name}")
        return self.registry.add_version(run, source, {}).number

    def crown(self, folder: Path) -> int:
        number = self.add(folder)
        with self.registry.lock(10) as lease:
            self.registry.crown([*self.registry.champions(), number], lease)
        return number


@pytest.fixture(scope="module")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes seconds to make one."""
    config = load_config(None, [f"workdir={tmp_path_factory.mktemp('registry')}", "registry.experiment=another"])
    open_registry(config)
    return config.layout.tracking_db


@pytest.fixture
def champions(config: Config, new_database: Path) -> Champions:
    shutil.copy(new_database, config.layout.tracking_db)
    return Champions(open_registry(config), config.layout.artifacts)


def damaged(folder: Path) -> Path:
    """A copy of a folder of heads, its weights cut off."""
    copy = shutil.copytree(folder, folder.with_name(f"{folder.name}-damaged"), dirs_exist_ok=True)
    (copy / WEIGHTS).write_bytes(b"nothing")
    return copy


@contextmanager
def started(config: Config) -> Iterator[ModelHost]:
    """A new replica's host."""
    host = ModelHost(config, _app)
    try:
        yield host
    finally:
        host.stop()


@pytest.fixture
def host(config: Config) -> Iterator[ModelHost]:
    with started(config) as host:
        yield host


@pytest.fixture
def url(host: ModelHost) -> Iterator[str]:
    with http_server(host.app) as base:
        yield base


def ask(url: str, **fields: Any) -> dict[str, Any]:
    response = httpx.post(f"{url}/v1/chat/completions", json={**ASK, **fields}, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def text_of(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


def version_of(folder: Path, number: int) -> Version:
    return Version(number=number, source=str(folder), run_id="run", folder=folder)


def test_new_heads_share_the_backbone_and_change_no_answer(
    host: ModelHost, url: str, save_heads: Callable[..., Path], tmp_path: Path
) -> None:
    before, backbone = ask(url), host._model.backbone
    host.adopt(version_of(save_heads(tmp_path / "v1"), 1))
    after = ask(url)
    assert host._model.backbone is backbone
    assert text_of(after) == text_of(before)
    assert before["system_fingerprint"].endswith("_plain")
    assert after["system_fingerprint"].endswith("_champion-v1")
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "version": "champion-v1"}


def test_a_tuned_backbone_takes_over_while_the_old_one_finishes(
    host: ModelHost, url: str, save_heads: Callable[..., Path], tmp_path: Path, tiny_folder: Path
) -> None:
    folder = save_heads(tmp_path / "v2", tuned=True)
    original = medusa.load(tiny_folder, heads=None, dtype="float32").generate("Hello", max_tokens=200, ignore_eos=True)
    tuned = medusa.load(tiny_folder, heads=folder, dtype="float32").generate("Hello", max_tokens=24)
    assert tuned.text != original.text[: len(tuned.text)]

    asked = {**ASK, "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=60) as response:
        lines = response.iter_lines()
        first = next(line for line in lines if line)
        host.adopt(version_of(folder, 2))
        new = ask(url)
        events = [first, *(line for line in lines if line)]
    chunks = [json.loads(line.removeprefix("data: ")) for line in events if not line.endswith("[DONE]")]
    streamed = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert streamed == original.text
    assert all(chunk["system_fingerprint"].endswith("_plain") for chunk in chunks)
    assert text_of(new) == tuned.text
    assert new["system_fingerprint"].endswith("_champion-v2")
    wait_until(lambda: len(host.loop._lanes) == 1)


def test_from_a_tuned_backbone_back_to_the_original(
    host: ModelHost, url: str, save_heads: Callable[..., Path], tmp_path: Path
) -> None:
    """Adapters are merged for good: the original must be loaded again, not taken for what is there."""
    before = text_of(ask(url))
    host.adopt(version_of(save_heads(tmp_path / "v2", tuned=True), 2))
    assert text_of(ask(url)) != before
    host.adopt(version_of(save_heads(tmp_path / "v3"), 3))
    assert text_of(ask(url)) == before


def test_heads_that_do_not_fit_are_refused_before_anything_changes(
    host: ModelHost, other: Model, url: str, tmp_path: Path
) -> None:
    foreign = save_checkpoint(
        tmp_path / "foreign",
        random_heads(other.backbone),
        paths=[(0,)],
        backbone_name="other",
        backbone_fingerprint=other.backbone.fingerprint,
    )
    lane = host.loop.lane
    with pytest.raises(CheckpointError, match="trained on backbone other"):
        host.adopt(version_of(foreign, 9))
    assert host.loop.lane is lane
    assert host.version == "plain"
    assert ask(url)["system_fingerprint"].endswith("_plain")


def test_a_key_file_that_is_bad_for_a_moment_keeps_no_champion_away(
    config: Config, champions: Champions, save_heads: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(hash_key("mine"))
    with started(serving_with(config, api_keys_file=file)) as host, http_server(host.app) as url:
        champions.crown(save_heads(tmp_path / "heads"))
        file.write_text("")
        host._follower.look()
        assert host.status() == {"version": "champion-v1"}
        asked = [httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}) for key in ("mine", "yours")]
        assert [response.status_code for response in asked] == [200, 401]


def test_a_change_that_fails_changes_nothing(config: Config, save_heads: Callable[..., Path], tmp_path: Path) -> None:
    """Neither where the new key file is bad nor where an app cannot be made: engine, limits and version stay."""
    made: list[Any] = []

    def only_once(*given: Any) -> Any:
        if made:
            raise RuntimeError("no second app")
        made.append(_app(*given))
        return made[0]

    host = ModelHost(config, only_once)
    try:
        before = host.loop.lane, host.loop.admission.max_waiting, host.version, host.app.newest
        with pytest.raises(KeyFileError):
            host.reconfigure({"context_length": 128, "max_waiting": 1, "api_keys_file": str(tmp_path / "none")})
        with pytest.raises(RuntimeError):
            host.reconfigure({"context_length": 128, "max_waiting": 1})
        with pytest.raises(RuntimeError):
            host.adopt(version_of(save_heads(tmp_path / "v1"), 1))
        assert (host.loop.lane, host.loop.admission.max_waiting, host.version, host.app.newest) == before
    finally:
        host.stop()


def test_loading_a_backbone_disturbs_no_answer_under_way(
    model: Model, config: Config, save_heads: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers sets torch's default dtype, which threads share, while it loads."""
    folder = save_heads(tmp_path / "v2", tuned=True)
    sampled: dict[str, Any] = dict(
        max_tokens=100, temperature=0.9, seed=7, top_p=0.9, acceptance="rejection", ignore_eos=True
    )
    expected = model.generate("Hello", **sampled).token_ids
    loaded: list[Model] = []
    section = config.backbone.model_copy(update={"dtype": "bfloat16"})
    loader = threading.Thread(target=lambda: loaded.append(successor(model, section, folder)))
    loader.start()
    answers = [model.generate("Hello", **sampled).token_ids]
    while loader.is_alive():
        answers.append(model.generate("Hello", **sampled).token_ids)
    assert loaded
    assert all(answer == expected for answer in answers)


def test_reconfigure_changes_limits_without_touching_the_engine(host: ModelHost, url: str) -> None:
    lane = host.loop.lane
    host.reconfigure({"max_waiting": 0, "max_wait_s": 5, "stall_after_s": 7})
    assert host.loop.lane is lane
    assert (host.loop.admission.max_waiting, host.loop.admission.max_wait_s, host.loop.stall_after_s) == (0, 5, 7)
    host.reconfigure({"context_length": 64})
    assert host.loop.lane is not lane
    assert (
        host.loop.admission.max_waiting == 64
    )  # what is not given is what the configuration says, not what was given before
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["max_model_len"] == 64


def test_a_request_under_way_keeps_the_context_that_it_began_with(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_ids = answering._token_ids

    def meanwhile(*given: Any) -> list[int]:
        monkeypatch.undo()
        host.reconfigure({"context_length": 256})
        return token_ids(*given)

    monkeypatch.setattr(answering, "_token_ids", meanwhile)
    with started(serving_with(config, context_length=128)) as host, http_server(host.app) as url:
        lengths = [ask(url, max_tokens=None, ignore_eos=True)["usage"]["total_tokens"] for _ in range(2)]
    assert lengths == [128, 256]


def test_reconfigure_follows_another_alias_at_once(
    host: ModelHost, champions: Champions, url: str, save_heads: Callable[..., Path], tmp_path: Path
) -> None:
    champions.crown(save_heads(tmp_path / "heads1", seed=1))
    canary = champions.add(save_heads(tmp_path / "heads2", seed=2))
    champions.registry.set_alias("canary", canary)
    host.reconfigure({"alias": "canary"})
    assert ask(url)["system_fingerprint"].endswith("_canary-v2")
    champions.registry.set_alias("canary", champions.add(damaged(tmp_path / "heads2")))
    host._follower.look()
    health = httpx.get(f"{url}/health").json()
    assert health["version"] == "canary-v2"
    assert "version 3 cannot be served" in health["champion_error"]
    assert ask(url)["system_fingerprint"].endswith("_canary-v2")


def test_an_alias_of_the_version_that_is_served_renames_it_and_touches_no_engine(
    config: Config, champions: Champions, save_heads: Callable[..., Path], tmp_path: Path
) -> None:
    number = champions.crown(save_heads(tmp_path / "heads"))
    with started(config) as host, http_server(host.app) as url:
        model, lane = host._model, host.loop.lane
        host.reconfigure({"alias": "staging"})
        champions.registry.set_alias("staging", number)
        for alias in ("staging", "champion", "staging"):
            host.reconfigure({"alias": alias})
            host._follower.look()
            assert host.status() == {"version": f"{alias}-v{number}"}
            assert ask(url, max_tokens=4)["system_fingerprint"].endswith(f"_{alias}-v{number}")
        assert (host._model, host.loop.lane) == (model, lane)


def test_an_alias_that_no_version_bears_is_told_while_another_version_is_served(
    config: Config, champions: Champions, save_heads: Callable[..., Path], tmp_path: Path
) -> None:
    champions.crown(save_heads(tmp_path / "heads"))
    with started(config) as host:
        host.reconfigure({"alias": "champoin"})
        assert host.status() == {
            "version": "champion-v1",
            "champion_error": "no version is 'champoin': champion-v1 stays",
        }
        host.reconfigure({})
        assert host.status() == {"version": "champion-v1"}


def test_what_was_replaced_is_freed_when_its_last_request_has_ended(host: ModelHost, url: str) -> None:
    """Without a collection of garbage: an engine may be gigabytes, and Python collects when it likes."""
    ask(url)
    httpx.get(f"{url}/health"), httpx.get(f"{url}/v1/models"), httpx.get(f"{url}/v1/models/{ASK['model']}")
    replaced = [weakref.ref(host.loop.lane.engine)]
    gc.disable()
    try:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json={**ASK, "stream": True}, timeout=60) as response:
            host.reconfigure({"context_length": 128})
            assert "[DONE]" in "".join(response.iter_lines())
        replaced.append(weakref.ref(host.loop.lane.engine))
        host.reconfigure({"context_length": 64})
        ask(url, max_tokens=4)
        wait_until(lambda: [engine() for engine in replaced] == [None, None])
    finally:
        gc.enable()


def test_an_app_that_was_replaced_is_garbage(host: ModelHost, url: str) -> None:
    httpx.get(f"{url}/metrics"), httpx.get(f"{url}/"), httpx.get(f"{url}/openapi.json")
    app = weakref.ref(host.app.newest._app)  # type: ignore[attr-defined]
    host.reconfigure({"max_waiting": 1})
    gc.collect()
    assert app() is None


def test_a_champion_that_is_loaded_while_another_alias_is_chosen_is_not_served_under_it(
    host: ModelHost,
    champions: Champions,
    save_heads: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def meanwhile(*given: Any) -> Model:
        monkeypatch.undo()
        host.reconfigure({"alias": "canary"})  # which nothing bears
        return successor(*given)

    monkeypatch.setattr("deploy.replica.successor", meanwhile)
    champions.crown(save_heads(tmp_path / "heads"))
    host._follower.look()
    assert host.version == "plain"
    host.reconfigure({})
    assert host.version == "champion-v1"


def test_a_new_replica_serves_the_champion_before_a_damaged_one_and_follows(
    config: Config, champions: Champions, save_heads: Callable[..., Path], tmp_path: Path
) -> None:
    """Back along the tag of champions to the first that loads: not the one before, which is damaged as well."""
    heads = save_heads(tmp_path / "good", seed=1)
    good = champions.crown(heads)
    for _ in range(2):
        bad = champions.crown(damaged(heads))
    with started(config) as host:
        assert host.version == f"champion-v{good}"
        assert host._model.heads is not None
        assert f"version {bad} cannot be served" in host.status()["champion_error"]
        with http_server(host.app) as url:
            assert httpx.get(f"{url}/health").json()["champion_error"] == host.status()["champion_error"]
            assert ask(url)["system_fingerprint"].endswith(f"_champion-v{good}")
        newest = champions.crown(save_heads(tmp_path / "newest", seed=2))
        host._follower.look()
        assert host.status() == {"version": f"champion-v{newest}"}


def test_without_a_registry_the_default_heads_are_served(
    config: Config, save_heads: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.heads.pretrained_heads", lambda name: save_heads(tmp_path / "default"))
    with started(config) as host:
        assert host.status() == {"version": "default"}
        assert host._model.heads is not None


def test_a_new_replica_whose_only_champion_is_damaged_serves_the_default_heads(
    config: Config,
    champions: Champions,
    save_heads: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heads = save_heads(tmp_path / "default")
    champions.crown(damaged(heads))
    with started(config) as host:  # no heads come with this backbone
        assert host.version == "plain"
    monkeypatch.setattr("deploy.heads.pretrained_heads", lambda name: heads)
    with started(config) as host:
        assert host.version == "default"
        assert host._model.heads is not None
        assert "version 1 cannot be served" in host.status()["champion_error"]


def test_a_champion_whose_files_are_away_is_served_when_they_are_back(
    config: Config, champions: Champions, save_heads: Callable[..., Path], tmp_path: Path
) -> None:
    first, second = (champions.crown(save_heads(tmp_path / name, seed=seed)) for seed, name in enumerate(("a", "b")))
    (stored,) = champions.root.rglob(f"{VERSION_FOLDER}-b")
    away = stored.rename(tmp_path / "away")
    with started(config) as host:
        assert host.version == f"champion-v{first}"
        assert f"version {second} cannot be fetched" in host.status()["champion_error"]
        away.rename(stored)
        host._follower.look()
        assert host.status() == {"version": f"champion-v{second}"}


def test_only_champions_have_champions_before_them(
    config: Config, champions: Champions, save_heads: Callable[..., Path], tmp_path: Path
) -> None:
    heads = save_heads(tmp_path / "good")
    champions.crown(heads)
    champions.registry.set_alias("canary", champions.add(damaged(heads)))
    with started(serving_with(config, alias="canary")) as host:
        assert host.version == "plain"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"port": 1}, r"serve\.port"),
        ({"drain_s": 1}, "graceful_shutdown_timeout_s"),
        ({"max_waitin": 1}, "max_waitin"),
        ({"max_batch_size": 0}, "max_batch_size"),
    ],
)
def test_reconfigure_names_what_it_cannot_do(host: ModelHost, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        host.reconfigure(given)


def test_what_the_server_does_is_measured(
    host: ModelHost, url: str, save_heads: Callable[..., Path], tmp_path: Path
) -> None:
    host.adopt(version_of(save_heads(tmp_path / "v1"), 1))
    num_tokens = ask(url)["usage"]["completion_tokens"]
    assert httpx.post(f"{url}/v1/chat/completions", json={**ASK, "n": 0}, timeout=60).status_code == 400
    wait_until(lambda: host.loop.load.running == 0)
    wait_until(lambda: samples(url)["medusa_num_requests_running"] == 0)
    seen = samples(url)
    assert seen["medusa_generation_tokens_total"] == num_tokens
    assert seen["medusa_time_to_first_token_seconds_count"] == 1
    assert seen["medusa_step_time_seconds_count", "prefill"] == 1
    assert seen["medusa_num_slots"] == 4
    assert seen["medusa_http_errors_total", "400"] == 1
    assert (seen["medusa_model_info", "plain"], seen["medusa_model_info", "champion-v1"]) == (0, 1)


def samples(url: str) -> dict[Any, float]:
    """What a scrape finds: by name, or by name and the value of the metric's own label."""
    found = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            own = [value for label, value in sample.labels.items() if label != "model_name"]
            found[(sample.name, *own) if own else sample.name] = sample.value
    return found
