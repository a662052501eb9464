"""The dashboard's and the alerts' queries, asked of a real Prometheus that scrapes a real server under a little load."""

from __future__ import annotations

import contextlib
import math
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

import medusa
from deploy.app import create_app
from deploy.engine_loop import EngineLoop
from deploy.metrics import Metrics
from deploy.service import Service
from medusa import Model
from medusa.engine import Engine
from tests.dashboard import ALERTS, alert_queries, panel_queries
from tests.unit.deploy.conftest import http_server
from tests.unit.medusa.tiny import random_heads

PROMETHEUS = shutil.which("prometheus")
pytestmark = pytest.mark.skipif(PROMETHEUS is None, reason="needs Debian's package prometheus")

SCRAPE_S = 1


class Prometheus:
    """A running one, asked over its HTTP API."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, **params: str) -> Any:
        reply = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=10).json()
        assert reply["status"] == "success", reply
        return reply["data"]

    def values(self, query: str) -> list[float]:
        return [float(each["value"][1]) for each in self.ask("query", query=query)["result"]]


@contextlib.contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """One that scrapes `target` (host:port) and evaluates the project's alert rules; its data goes into `folder`."""
    rules = folder / "alerts.yaml"
    rules.write_text(ALERTS.read_text(encoding="utf-8"))
    config = {
        "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": "medusa", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    assert PROMETHEUS is not None
    flags = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    process = subprocess.Popen(
        [PROMETHEUS, *flags, f"--web.listen-address={address}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            assert process.poll() is None, f"Prometheus ended with {process.returncode}"
            assert time.monotonic() < deadline, "Prometheus did not start"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://{address}/-/ready").status_code == 200:
                    break
            time.sleep(0.1)
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def scraping(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has seen a server's load begin and go on for several scrapes."""
    plain = medusa.load(tiny_folder, heads=None, dtype="float32")
    model = Model(plain.backbone, random_heads(plain.backbone))
    metrics = Metrics("tiny")
    metrics.serving("champion-v1")

    def make_engine() -> Engine:
        return Engine(
            model.backbone,
            model.heads,
            tree=model.tree,
            max_batch_size=4,
            context_length=256,
            on_step=metrics.step,
        )

    loop = EngineLoop(make_engine, model.backbone.tokenizer, metrics=metrics).start()
    service = Service(name="tiny", model=model, loop=loop, fingerprint="fp")
    try:
        with (
            http_server(create_app(service)) as url,
            prometheus(tmp_path_factory.mktemp("prometheus"), url.removeprefix("http://")) as running,
        ):
            load(url, running)
            yield running
    finally:
        loop.stop()


def load(url: str, running: Prometheus, timeout_s: float = 40.0) -> None:
    """Ask until the load's own traces have been scraped a few times: a rate needs two samples after a series began."""

    def ask(number: int) -> None:
        asked = {"model": "tiny", "messages": [{"role": "user", "content": f"Hello {number}"}], "max_tokens": 24}
        wrong = {"max_tokens": 0} if number % 4 == 0 else {}
        httpx.post(f"{url}/v1/chat/completions", json=asked | wrong, timeout=30)

    query = "min(count_over_time(medusa_spec_decode_num_accepted_tokens_per_pos_total[1m]))"
    deadline = time.monotonic() + timeout_s
    with ThreadPoolExecutor(6) as pool:
        while not any(samples >= 4 for samples in running.values(query)):
            assert time.monotonic() < deadline, f"no samples: {running.ask('targets')['activeTargets']}"
            list(pool.map(ask, range(12)))
            time.sleep(0.2)


def test_every_query_of_the_dashboard_has_data(scraping: Prometheus) -> None:
    queries = panel_queries(interval="30s")
    for panel, query in queries:
        values = scraping.values(query)
        assert values, f"{panel}: no data for {query}"
        assert not all(map(math.isnan, values)), f"{panel}: nothing but NaN for {query}"


def test_what_the_dashboard_shows_is_true(scraping: Prometheus) -> None:
    shown = dict(reversed(panel_queries(interval="30s")))  # each panel's first query
    rate = scraping.values(shown["Acceleration rate"])[0]
    assert 1 < rate <= 4, "three heads give four tokens a step at most"
    depths = scraping.values(shown["Acceptance by depth"])
    assert all(0 <= share <= 1 for share in depths)
    assert rate == pytest.approx(1 + sum(depths), rel=0.05), "each depth adds its share of a token to the step"
    assert scraping.values('medusa_model_info{version="champion-v1"}') == [1]


def test_the_alert_rules_are_evaluated_and_silent(scraping: Prometheus) -> None:
    rules = [rule for group in scraping.ask("rules")["groups"] for rule in group["rules"]]
    assert [rule["name"] for rule in rules] == [name for name, _ in alert_queries()]
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
    assert {rule["state"] for rule in rules} == {"inactive"}
    for name, query in alert_queries():
        left = query.rpartition(" > " if " > " in query else " < ")[0]
        assert scraping.values(left), f"{name} would watch nothing"
