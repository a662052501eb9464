"""Metrics against their own definitions: what is recorded is what a scrape reads, and two outlets never differ."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy import metric_names
from deploy.metric_names import SPECS, Spec
from deploy.metrics import Metrics
from deploy.openapi import GENERATION
from deploy.outlets import RayOutlet, Record
from medusa.engine import Completion, Delta, FinishReason, Stats, StepRecord
from tests.unit.deploy.conftest import BATCH, PacedEngine, wait_until


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Ledger:
    """An outlet that adds up what it is given, and refuses what Ray's refuses."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}

    def recorder(self, spec: Spec, labels: Mapping[str, str]) -> Record:
        key = (spec.name, frozenset(labels.items()))

        def record(value: float) -> None:
            assert spec.kind != "counter" or value > 0
            self.sums[key] = value if spec.kind == "gauge" else self.sums.get(key, 0.0) + value

        return record


def scraped(metrics: Metrics) -> dict[str, float]:
    """Series → value, as Prometheus reads them; labels other than the model's in braces."""
    samples = {}
    for family in text_string_to_metric_families(metrics.prometheus.exposition().decode()):
        for sample in family.samples:
            if sample.name.startswith("medusa_"):
                assert sample.labels.pop("model_name") == "tiny"
                labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
                samples[sample.name.removeprefix("medusa_") + (f"{{{labels}}}" if labels else "")] = sample.value
    return samples


def completion(tokens_per_step: list[int], *, reason: FinishReason = "stop", **stats: Any) -> Completion:
    tokens = list(range(sum(tokens_per_step)))
    made = Stats(tokens_per_step=tokens_per_step, nodes_per_step=[0] + [8] * (len(tokens_per_step) - 1), **stats)
    return Completion(request_id="r", token_ids=tokens, finish_reason=reason, stats=made)


def delta(count: int, ended: Completion | None = None) -> Delta:
    return Delta(request_id="r", token_ids=list(range(count)), completion=ended)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> Metrics:
    return Metrics("tiny", clock=clock)


def test_one_request_is_told_from_arrival_to_end(metrics: Metrics, clock: Clock) -> None:
    request = metrics.arrival()
    clock.now += 0.3
    request.output(delta(1))
    clock.now += 0.05
    request.output(delta(3))
    clock.now += 0.07
    ended = completion([1, 3, 2], prompt_tokens=12, cached_tokens=8, queue_s=0.2, prefill_s=0.1, decode_s=0.12)
    request.output(delta(2, ended))

    seen = scraped(metrics)
    assert seen["time_to_first_token_seconds_sum"] == pytest.approx(0.3)
    assert seen["inter_token_latency_seconds_count"] == 2
    assert seen["inter_token_latency_seconds_sum"] == pytest.approx(0.12)
    assert seen["e2e_request_latency_seconds_sum"] == pytest.approx(0.42)
    assert seen["request_time_per_output_token_seconds_sum"] == pytest.approx(0.12 / 5)
    assert seen["request_queue_time_seconds_sum"] == pytest.approx(0.2)
    assert seen["request_acceleration_rate_sum"] == pytest.approx(5 / 2)
    assert seen["generation_tokens_total"] == 6
    assert (seen["prefix_cache_queries_total"], seen["prefix_cache_hits_total"]) == (12, 8)
    assert seen["request_success_total{finished_reason=stop}"] == 1
    # A step of three tokens took the guesses of two heads, one of two that of the first alone.
    assert seen["spec_decode_num_accepted_tokens_per_pos_total{position=0}"] == 2
    assert seen["spec_decode_num_accepted_tokens_per_pos_total{position=1}"] == 1
    assert "spec_decode_num_accepted_tokens_per_pos_total{position=2}" not in seen


def test_steps_tell_phases_nodes_and_acceptance(metrics: Metrics) -> None:
    metrics.step(StepRecord(phase="prefill", seconds=0.2, rows=2, nodes=0, tokens=40))
    metrics.step(StepRecord(phase="decode", seconds=0.05, rows=3, nodes=16, tokens=7))
    metrics.step(StepRecord(phase="decode", seconds=0.04, rows=2, nodes=1, tokens=2))
    seen = scraped(metrics)
    assert seen["step_time_seconds_sum{phase=prefill}"] == pytest.approx(0.2)
    assert seen["step_time_seconds_count{phase=decode}"] == 2
    assert seen["prompt_tokens_total"] == 40
    assert seen["spec_decode_num_drafts_total"] == 5
    assert seen["spec_decode_num_draft_tokens_total"] == 3 * 15
    assert seen["spec_decode_num_accepted_tokens_total"] == 4
    assert seen["tree_nodes"] == 1


def test_load_errors_and_the_version_served(metrics: Metrics) -> None:
    metrics.load(running=3, waiting=2, slots=4)
    metrics.error(429)
    metrics.error(418)
    metrics.serving("champion-v1")
    metrics.serving("champion-v2")
    seen = scraped(metrics)
    assert (seen["num_requests_running"], seen["num_requests_waiting"], seen["num_slots"]) == (3, 2, 4)
    assert seen["kv_cache_usage_perc"] == 0.75
    assert (seen["http_errors_total{status=429}"], seen["http_errors_total{status=503}"]) == (1, 0)
    assert all(seen[f"http_errors_total{{status={status}}}"] == 0 for status in GENERATION if status != 429)
    assert seen["http_errors_total{status=418}"] == 1
    assert (seen["model_info{version=champion-v1}"], seen["model_info{version=champion-v2}"]) == (0, 1)


@pytest.mark.parametrize("reason", ["cancelled", "timeout", "slow_reader", "invalid", "engine"])
def test_a_request_that_ends_early_is_a_failure_and_no_success(metrics: Metrics, reason: Any) -> None:
    request = metrics.arrival()
    request.output(delta(1))
    request.failure(reason)
    seen = scraped(metrics)
    assert seen[f"request_failure_total{{reason={reason}}}"] == 1
    assert seen["request_success_total{finished_reason=stop}"] == 0
    assert seen["e2e_request_latency_seconds_count"] == 0


def test_every_outlet_gets_the_same_and_counters_never_get_zero(clock: Clock) -> None:
    """A request whose counts are zero: no guess accepted, nothing cached. Ray's counters raise at zero."""
    ledger = Ledger()
    metrics = Metrics("tiny", outlets=[ledger], clock=clock)
    metrics.step(StepRecord(phase="decode", seconds=0.05, rows=1, nodes=1, tokens=1))
    metrics.arrival().output(delta(1, completion([1])))
    metrics.load(running=0, waiting=0, slots=4)
    by_name = {name: value for (name, _), value in ledger.sums.items()}
    seen = scraped(metrics)
    assert by_name["spec_decode_num_drafts"] == seen["spec_decode_num_drafts_total"] == 1
    assert by_name["generation_tokens"] == seen["generation_tokens_total"] == 1
    assert by_name["time_to_first_token_seconds"] == seen["time_to_first_token_seconds_sum"]
    assert all(("model_name", "tiny") in labels for _, labels in ledger.sums)


def test_names_are_legal_for_prometheus_and_for_ray() -> None:
    """Ray refuses colons; both add _total to counters, so no name may end so itself."""
    names = [spec.full_name for spec in SPECS]
    assert len(set(names)) == len(names) > 25
    for spec in SPECS:
        assert re.fullmatch(r"medusa_[a-z0-9_]+", spec.full_name)
        assert not spec.name.endswith(("_total", "_count", "_sum", "_bucket"))
        assert spec.help.endswith(".")
        assert list(spec.buckets) == sorted(set(spec.buckets))
        assert (spec.kind == "histogram") == bool(spec.buckets)
        assert all(bound > 0 for bound in spec.buckets), "Ray's histograms want positive bounds"


def test_what_is_always_there_covers_every_definition(metrics: Metrics) -> None:
    """Series exist before anything happened, so that a rate begins at zero; two depend on what comes."""
    late = {metric_names.ACCEPTED_AT.name, metric_names.MODEL.name}
    seen = {re.sub(r"\{.*", "", name) for name in scraped(metrics)}
    for spec in SPECS:
        series = {name.removeprefix("medusa_") for name in spec.series}
        assert (series <= seen) == (spec.name not in late), spec.name


def test_a_step_costs_microseconds(metrics: Metrics) -> None:
    """A step of eight sequences, all outlets but Ray's: under a millisecond even on a busy machine."""
    requests = [metrics.arrival() for _ in range(8)]
    outputs = delta(3)
    best = float("inf")
    for _ in range(50):
        began = time.perf_counter()
        metrics.step(StepRecord(phase="decode", seconds=0.05, rows=8, nodes=16, tokens=24))
        for request in requests:
            request.output(outputs)
        metrics.load(running=8, waiting=0, slots=8)
        best = min(best, time.perf_counter() - began)
    assert best < 1e-3


def test_rays_outlet_records_elsewhere_and_survives_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording is a put into a queue; a record that Ray refuses is logged, and the next is still made."""
    made: list[float] = []

    class Gauge:
        def set_default_tags(self, tags: dict[str, str]) -> Gauge:
            assert tags == {"model_name": "tiny"}
            return self

        def set(self, value: float) -> None:
            if value < 0:
                raise ValueError(value)
            made.append(value)

    outlet = RayOutlet(repeat_s=3600)
    monkeypatch.setattr(outlet, "_metric", lambda spec, labels: Gauge())
    record = outlet.recorder(metric_names.RUNNING, {"model_name": "tiny"})
    for value in (1.0, -1.0, 2.0):
        record(value)
    deadline = time.monotonic() + 5
    while made != [1.0, 2.0] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made == [1.0, 2.0]


def test_rays_outlet_says_again_what_gauges_are_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, float]] = []

    class Metric:
        def set_default_tags(self, tags: dict[str, str]) -> Metric:
            self.series = "/".join(tags.values())
            return self

        def record(self, value: float) -> None:
            made.append((self.series, value))

        set = inc = observe = record

    outlet = RayOutlet(repeat_s=0.01)
    monkeypatch.setattr(outlet, "_metric", lambda spec, labels: Metric())
    outlet.recorder(metric_names.TOKENS, {"model_name": "tokens"})(5)
    outlet.recorder(metric_names.TTFT, {"model_name": "ttft"})(5)
    running = [outlet.recorder(metric_names.RUNNING, {"model_name": name}) for name in ("a", "b")]
    for value in (1, 2):
        for record in running:
            record(value)
    wait_until(lambda: made.count(("a", 2)) > 3 and made.count(("b", 2)) > 3)
    assert made.count(("tokens", 5)) == made.count(("ttft", 5)) == 1
    assert made.index(("a", 2)) > max(index for index, each in enumerate(made) if each == ("a", 1))


def ask(url: str, *, timeout_s: float = 30, **fields: Any) -> httpx.Response:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=timeout_s)


def test_a_servers_metrics_add_up(make_loop: Callable, serve_app: Callable) -> None:
    """Each token is a request's first, a verify step's own, or an accepted guess; each accepted guess has a depth."""
    with make_loop() as loop, serve_app(loop) as url:
        answers = [ask(url, max_tokens=size, ignore_eos=True) for size in (1, 9, 24)]
        tokens = sum(answer.json()["usage"]["completion_tokens"] for answer in answers)
        assert ask(url, max_tokens=0).status_code == 400
        wait_until(lambda: scraped(loop.metrics)["num_requests_running"] == 0)
        seen = scraped(loop.metrics)
    assert tokens == 34
    assert seen["generation_tokens_total"] == tokens
    by_depth = [value for name, value in seen.items() if "accepted_tokens_per_pos_total" in name]
    assert sum(by_depth) == seen["spec_decode_num_accepted_tokens_total"] > 0
    assert len(by_depth) <= 3, "as many positions as heads"
    steps = seen["spec_decode_num_drafts_total"]
    assert steps + seen["spec_decode_num_accepted_tokens_total"] == tokens - len(answers)
    assert seen["inter_token_latency_seconds_count"] == steps == seen["step_time_seconds_count{phase=decode}"]
    assert seen["request_success_total{finished_reason=length}"] == len(answers)
    assert seen["time_to_first_token_seconds_count"] == len(answers)
    assert seen["http_errors_total{status=400}"] == 1
    assert seen["num_slots"] == BATCH


def test_a_client_that_leaves_is_a_failure_of_its_own_kind(make_loop: Callable, serve_app: Callable) -> None:
    with make_loop(PacedEngine) as loop, serve_app(loop) as url:
        with pytest.raises(httpx.ReadTimeout):
            ask(url, timeout_s=0.3, ignore_eos=True)
        wait_until(lambda: scraped(loop.metrics)["request_failure_total{reason=cancelled}"] == 1)
        wait_until(lambda: scraped(loop.metrics)["num_requests_running"] == 0)
        assert scraped(loop.metrics)["request_success_total{finished_reason=length}"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_time_is_up_is_a_timeout_and_no_clients_cancelling(
    make_loop: Callable, serve_app: Callable, stream: bool
) -> None:
    """A stream began with 200: only `request_failure` tells of it."""
    with make_loop(PacedEngine) as loop, serve_app(loop, request_timeout_s=0.2) as url:
        ask(url, n=2, ignore_eos=True, stream=stream)
        wait_until(lambda: scraped(loop.metrics)["request_failure_total{reason=timeout}"] == 2)
        seen = scraped(loop.metrics)
    assert seen["request_failure_total{reason=cancelled}"] == 0
    assert seen["http_errors_total{status=408}"] == (0 if stream else 1)
