"""What a server measures while it serves. Knows steps, requests and load; knows no HTTP, no Ray.

Fed by the engine (`Metrics.step` is its `on_step`), by the engine loop (its load, each request's outputs and end) and by
the routes (errors). A step of the engine costs a few records and one or two for each sequence: microseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from deploy import metric_names as names
from deploy.metric_names import MODEL_LABEL, Spec
from deploy.outlets import Outlet, PrometheusOutlet, Record
from medusa.engine import Completion, Delta, StepRecord

FailureReason = Literal["cancelled", "timeout", "slow_reader", "invalid", "engine"]
# There from the start, so that a rate has a zero.
_EXPECTED_STATUSES = (400, 401, 404, 405, 408, 413, 422, 429, 500, 503)


class Metrics:
    """The metrics of one served model, in a Prometheus registry of its own and in the outlets beside it.

    Counters and gauges may be recorded from any thread; each request and `step` belong to the engine's.
    """

    def __init__(
        self, model_name: str = "model", *, outlets: Sequence[Outlet] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.prometheus = PrometheusOutlet()
        self.clock = clock
        self._outlets = (self.prometheus, *outlets)
        self._model_name = model_name
        self._version: str | None = None
        self._running = self.of(names.RUNNING)
        self._waiting = self.of(names.WAITING)
        self._slots = self.of(names.SLOTS)
        self._slot_use = self.of(names.SLOT_USE)
        self._nodes = self.of(names.NODES)
        self._step_time = {phase: self.of(names.STEP, phase=phase) for phase in ("prefill", "decode")}
        self._prompt_tokens = self.of(names.PROMPT_TOKENS)
        self._drafts = self.of(names.DRAFTS)
        self._draft_tokens = self.of(names.DRAFT_TOKENS)
        self._accepted = self.of(names.ACCEPTED)
        self._errors = {status: self.of(names.HTTP_ERRORS, status=str(status)) for status in _EXPECTED_STATUSES}
        self._requests = _RequestRecords(self)

    def of(self, spec: Spec, **labels: str) -> Record:
        """What records one series of `spec` in every outlet."""
        records = [outlet.recorder(spec, {MODEL_LABEL: self._model_name, **labels}) for outlet in self._outlets]
        if len(records) == 1:
            return records[0]

        def record(value: float) -> None:
            for each in records:
                each(value)

        return record

    def serving(self, version: str) -> None:
        """New requests get the weights of this name from now on."""
        if self._version is not None:
            self.of(names.MODEL, version=self._version)(0)
        self.of(names.MODEL, version=version)(1)
        self._version = version

    def step(self, record: StepRecord) -> None:
        """One forward of the engine: `Engine(on_step=metrics.step)`."""
        self._step_time[record.phase](record.seconds)
        if record.phase == "prefill":
            _add(self._prompt_tokens, record.tokens)
        else:
            self._nodes(record.nodes)
            self._drafts(record.rows)
            _add(self._draft_tokens, record.rows * (record.nodes - 1))
            _add(self._accepted, record.tokens - record.rows)

    def load(self, *, running: int, waiting: int, slots: int) -> None:
        self._running(running)
        self._waiting(waiting)
        self._slots(slots)
        self._slot_use(min(running / slots, 1.0))

    def error(self, status: int) -> None:
        """A response with this status left the server."""
        if status not in self._errors:
            self._errors[status] = self.of(names.HTTP_ERRORS, status=str(status))
        self._errors[status](1)

    def arrival(self) -> RequestMetrics:
        """A request has come."""
        return RequestMetrics(self._requests, self.clock)


class RequestMetrics:
    """One request from its arrival, which is when this is made, to its end."""

    def __init__(self, records: _RequestRecords, clock: Callable[[], float]) -> None:
        self._records = records
        self._clock = clock
        self._arrived = self._last_output = clock()
        self._has_output = False

    def output(self, delta: Delta) -> None:
        """What one step gave the request, and its completion with the last."""
        now, records = self._clock(), self._records
        if delta.token_ids:
            records.tokens(len(delta.token_ids))
            if self._has_output:
                records.itl(now - self._last_output)
                records.accept(len(delta.token_ids) - 1)
            else:
                records.ttft(now - self._arrived)
            self._has_output, self._last_output = True, now
        if delta.completion is not None:
            records.finish(delta.completion, now - self._arrived)

    def failure(self, reason: FailureReason) -> None:
        """The request ended without a completion."""
        self._records.failures[reason](1)


class _RequestRecords:
    """The series that requests are recorded in."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.tokens = metrics.of(names.TOKENS)
        self.ttft = metrics.of(names.TTFT)
        self.itl = metrics.of(names.ITL)
        self.failures = {reason: metrics.of(names.FAILURE, reason=reason) for reason in get_args(FailureReason)}
        self._success = {reason: metrics.of(names.SUCCESS, finished_reason=reason) for reason in ("stop", "length")}
        self._accepted_at: list[Record] = []
        self._cache_queries = metrics.of(names.CACHE_QUERIES)
        self._cache_hits = metrics.of(names.CACHE_HITS)
        self._e2e = metrics.of(names.E2E)
        self._queue = metrics.of(names.QUEUE)
        self._prefill = metrics.of(names.PREFILL)
        self._decode = metrics.of(names.DECODE)
        self._tpot = metrics.of(names.TPOT)
        self._prompt_size = metrics.of(names.PROMPT_SIZE)
        self._answer_size = metrics.of(names.ANSWER_SIZE)
        self._rate = metrics.of(names.RATE)

    def accept(self, num_accepted: int) -> None:
        """A verify step took the guesses of the first `num_accepted` heads."""
        while len(self._accepted_at) < num_accepted:
            position = str(len(self._accepted_at))
            self._accepted_at.append(self._metrics.of(names.ACCEPTED_AT, position=position))
        for record in self._accepted_at[:num_accepted]:
            record(1)

    def finish(self, completion: Completion, seconds: float) -> None:
        stats = completion.stats
        if completion.finish_reason in self._success:
            self._success[completion.finish_reason](1)
        else:  # only a grammar ends an answer otherwise
            self.failures["invalid"](1)
        self._e2e(seconds)
        self._queue(stats.queue_s)
        self._prefill(stats.prefill_s)
        self._decode(stats.decode_s)
        self._prompt_size(stats.prompt_tokens)
        self._answer_size(stats.num_tokens)
        _add(self._cache_queries, stats.prompt_tokens)
        _add(self._cache_hits, stats.cached_tokens)
        if stats.num_tokens > 1:
            self._tpot(stats.decode_s / (stats.num_tokens - 1))
        if stats.acceleration_rate is not None:
            self._rate(stats.acceleration_rate)


def _add(record: Record, value: float) -> None:
    """Ray's counters refuse zero."""
    if value > 0:
        record(value)
