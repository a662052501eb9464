"""Real Ray Serve, a tiny model, OpenAI's own client: the champion answers, streams, and refuses as OpenAI would."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

import medusa
from deploy.metric_names import (
    MODEL,
    MODEL_LABEL,
    NODES,
    RUNNING,
    SLOT_USE,
    SLOTS,
    STEP,
    SUCCESS,
    TOKENS,
    TTFT,
    WAITING,
)
from deploy.serve import serving
from medusa import Model
from medusa.checkpoint import save_checkpoint
from pipelines.config import Config, load_config
from pipelines.registry import CHAMPION, VERSION_FOLDER, open_registry
from tests.local_cluster import wait_until
from tests.tiny_models import save_tiny_folder
from tests.unit.medusa.tiny import random_heads

ROOT = Path(__file__).resolve().parents[2]
REPORT_S = 3  # between what Ray's processes tell its metrics port; ten seconds unless a test is to wait for it
PROMPTS = ["Hello", "Why is the sky blue?", "Count to ten.", "Write a poem about a tree."]


def ask(text: str) -> dict[str, Any]:
    return dict(model="llama", messages=[{"role": "user", "content": text}], max_tokens=32, temperature=0)


@pytest.fixture(scope="module")
def config(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A working directory whose registry holds one version, the champion: random heads of the tiny backbone."""
    workdir = tmp_path_factory.mktemp("served")
    config = load_config(
        None,
        [
            f"workdir={workdir}",
            f"backbone.name={tiny_folder}",
            "backbone.dtype=float32",
            "serve.port=0",
            "serve.context_length=256",
            "ray.object_store_mb=100",
        ],
    )
    backbone = medusa.load(tiny_folder, heads=None, dtype="float32").backbone
    folder = save_checkpoint(
        workdir / "heads",
        random_heads(backbone),
        paths=[(0,), (1,), (0, 0), (0, 1)],
        backbone_name=backbone.name,
        backbone_fingerprint=backbone.fingerprint,
    )
    registry = open_registry(config)
    run = registry.run_for("test", {})
    version = registry.add_version(run, registry.log_folder(run, folder, VERSION_FOLDER), {})
    registry.set_alias(CHAMPION, version.number)
    return config


@pytest.fixture(scope="module")
def url(config: Config) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_metrics_report_interval_ms", str(REPORT_S * 1000))
        with serving(config) as base:
            yield base


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> Model:
    """What every greedy answer must equal."""
    return medusa.load(tiny_folder, heads=None, dtype="float32")


def test_the_champion_answers(client: openai.OpenAI, plain: Model) -> None:
    answer = client.chat.completions.create(**ask("Hello"))
    expected = plain.generate("Hello", max_tokens=32)
    assert answer.choices[0].message.content == expected.text
    assert answer.system_fingerprint == f"fp_{plain.backbone.fingerprint}_champion-v1"
    assert [model.id for model in client.models.list()] == ["llama"]


def test_concurrent_streams_equal_solo_answers(client: openai.OpenAI, plain: Model) -> None:
    def stream(text: str) -> str:
        chunks = client.chat.completions.create(**ask(text), stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(stream, PROMPTS))
    assert answers == [plain.generate(text, max_tokens=32).text for text in PROMPTS]


def test_a_stream_passes_the_proxy_piece_by_piece(url: str) -> None:
    """Pieces that Serve held back and sent together would arrive as one read."""
    asked = {**ask("Hello"), "max_tokens": 150, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        reads = [text for text in response.iter_raw() if text]
    assert b"".join(reads).rstrip().endswith(b"[DONE]")
    assert len(reads) > 5


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [({"n": 99}, 400, "n"), ({"max_tokens": 0}, 400, "max_tokens"), ({"model": "gpt-5"}, 404, "model")],
)
def test_refusals_are_openais_error_objects(url: str, fields: dict[str, Any], status: int, param: str) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", json={**ask("Hello"), **fields}, timeout=60)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param


def test_unknown_routes_are_error_objects_too(url: str) -> None:
    missing, wrong = httpx.get(f"{url}/v1/nothing"), httpx.get(f"{url}/v1/chat/completions")
    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert {response.json()["error"]["type"] for response in (missing, wrong)} == {"invalid_request_error"}


def test_a_client_that_leaves_does_not_hold_its_slot(url: str, client: openai.OpenAI, config: Config) -> None:
    """More clients leave than there are slots; the next is answered as fast as ever."""
    asked = {**ask("Hello"), "max_tokens": 200, "stream": True, "ignore_eos": True}
    for _ in range(config.serve.max_batch_size + 2):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=60) as response:
            next(response.iter_raw())
    assert client.chat.completions.create(**ask("Hello")).choices[0].message.content


def on_rays_metrics_port() -> dict[str, float]:
    """Sum of the series of each of our names, as a cluster's Prometheus scrapes them."""
    (node,) = ray.nodes()
    page = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10).text
    found: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.labels.get(MODEL_LABEL) == "llama":
                found[sample.name] += sample.value
    return found


def test_rays_metrics_port_has_our_metrics_and_keeps_those_of_an_idle_replica(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**ask("Hello"))
    assert answer.usage is not None
    counted = {f"ray_{name}" for spec in (TOKENS, TTFT, STEP, SUCCESS) for name in spec.series}
    gauges = {f"ray_{name}" for spec in (RUNNING, WAITING, SLOTS, SLOT_USE, NODES, MODEL) for name in spec.series}
    wait_until(lambda: counted | gauges <= set(on_rays_metrics_port()), timeout_s=60, what="our names")
    assert on_rays_metrics_port()["ray_medusa_generation_tokens_total"] >= answer.usage.completion_tokens
    time.sleep(2.5 * REPORT_S)  # Ray itself forgets a gauge that was not set since its last report
    idle = on_rays_metrics_port()
    assert gauges <= set(idle)
    assert (idle["ray_medusa_num_requests_running"], idle["ray_medusa_model_info"]) == (0, 1)


@contextlib.contextmanager
def serve_command(folder: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """A tiny model with room for long answers, in a process group of its own, as a terminal starts it."""
    backbone = save_tiny_folder(folder / "llama", max_position_embeddings=4096)
    overrides = [f"workdir={folder}", f"backbone.name={backbone}", "backbone.dtype=float32"]
    command = [
        sys.executable,
        "-m",
        "deploy.cli",
        "serve",
        "--port",
        str(port),
        *overrides,
        "serve.context_length=4000",
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def first_refusal(url: str) -> httpx.Response | None:
    """What a server that is leaving answers a new request; None where it was gone before it had to refuse one."""
    while True:
        try:
            response = httpx.post(f"{url}/v1/chat/completions", json=ask("Hello"), timeout=60)
        except httpx.TransportError:
            return None
        if response.status_code != 200:
            return response


def test_the_command_is_ready_when_health_says_so_and_finishes_its_answers(tmp_path: Path) -> None:
    """Ctrl-C reaches the whole process group: whatever of Ray heeded it would cut the stream."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with serve_command(tmp_path, port) as process:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "not ready in 240 s"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            time.sleep(0.05)  # Serve says only later that it runs; a Ctrl-C until then cuts nothing off either
        asked = {**ask("Hello"), "max_tokens": 2500, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=60) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            os.killpg(process.pid, signal.SIGINT)
            late = first_refusal(url)
            events = list(lines)
        assert events[-1] == "data: [DONE]"
        if late is not None:
            assert late.status_code == 503
            assert late.json()["error"]["type"] == "service_unavailable_error"
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert log.splitlines()[-1] == "stopped"
    assert "Traceback" not in log
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_a_replica_that_cannot_load_is_one_line(config: Config) -> None:
    outcome = subprocess.run(
        [
            sys.executable,
            "-m",
            "deploy.cli",
            "serve",
            f"workdir={config.workdir}",
            "backbone.name=nowhere",
            "serve.port=0",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert outcome.returncode == 2, outcome.stderr
    assert outcome.stderr.splitlines()[-1].startswith("medusa: error: no replica came up: ")
    assert "nowhere" in outcome.stderr.splitlines()[-1]
