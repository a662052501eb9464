"""Where metrics leave: Prometheus' own registry, or Ray's. Knows both client libraries; knows nothing of what is measured.

An outlet turns a definition and the values of its labels into a function that records: a counter's adds, a gauge's
sets, a histogram's observes.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from deploy.metric_names import Spec

logger = logging.getLogger(__name__)

Record = Callable[[float], None]
GAUGES_AGAIN_S = 1.0  # Ray reports every ten seconds, unless it is told otherwise
_METHODS = {"counter": "inc", "gauge": "set", "histogram": "observe"}


class Outlet(Protocol):
    def recorder(self, spec: Spec, labels: Mapping[str, str]) -> Record:
        """What records one series of `spec`; `labels` gives each of its labels a value, and the model's."""


class PrometheusOutlet:
    """A registry of its own, for a process that is itself scraped. Recording takes a microsecond or two."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._families: dict[str, Any] = {}
        ProcessCollector(registry=self._registry)

    def recorder(self, spec: Spec, labels: Mapping[str, str]) -> Record:
        if spec.name not in self._families:
            self._families[spec.name] = self._family(spec, tuple(labels))
        record: Record = getattr(self._families[spec.name].labels(**labels), _METHODS[spec.kind])
        return record

    def _family(self, spec: Spec, labels: tuple[str, ...]) -> Any:
        names: dict[str, Any] = dict(labelnames=labels, registry=self._registry)
        match spec.kind:
            case "counter":
                return Counter(spec.full_name, spec.help, **names)
            case "gauge":
                return Gauge(spec.full_name, spec.help, **names)
            case "histogram":
                return Histogram(spec.full_name, spec.help, buckets=spec.buckets, **names)

    def exposition(self) -> bytes:
        """What a scrape reads."""
        return generate_latest(self._registry)


class RayOutlet:
    """Ray's metrics, for a process in a cluster: Ray carries them to its nodes' metrics ports and names the worker.

    Ray takes ten times as long over a record as Prometheus' client, so a thread of its own does it: for whoever
    records, it is a put into a queue. Ray's report of a gauge is of what was set since the report before, so that one which
    keeps its value would vanish: each is set again every `repeat_s`.
    """

    def __init__(self, *, repeat_s: float = GAUGES_AGAIN_S) -> None:
        self._repeat_s = repeat_s
        self._records: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._gauges: dict[tuple[Any, ...], Callable[[], None]] = {}  # the thread's: how each series was set last
        threading.Thread(target=self._run, name="medusa-ray-metrics", daemon=True).start()

    def recorder(self, spec: Spec, labels: Mapping[str, str]) -> Record:
        # Ray makes one metric of all objects of a name; default tags spare it to merge and check them at each record.
        method = getattr(self._metric(spec, tuple(labels)).set_default_tags(dict(labels)), _METHODS[spec.kind])
        if spec.kind == "gauge":
            series = (spec.name, *labels.values())
            return lambda value: self._records.put(
                functools.partial(self._set, series, functools.partial(method, value))
            )
        return lambda value: self._records.put(functools.partial(method, value))

    def _set(self, series: tuple[Any, ...], record: Callable[[], None]) -> None:
        record()
        self._gauges[series] = record

    def _metric(self, spec: Spec, labels: tuple[str, ...]) -> Any:
        from ray.util import metrics  # a server without Ray has no use for it

        match spec.kind:
            case "counter":
                return metrics.Counter(spec.full_name, spec.help, tag_keys=labels)
            case "gauge":
                return metrics.Gauge(spec.full_name, spec.help, tag_keys=labels)
            case "histogram":
                return metrics.Histogram(spec.full_name, spec.help, boundaries=list(spec.buckets), tag_keys=labels)

    def _run(self) -> None:
        due = time.monotonic() + self._repeat_s
        while True:
            try:
                if (now := time.monotonic()) >= due:
                    due = now + self._repeat_s
                    for record in self._gauges.values():
                        record()
                self._records.get(timeout=due - now)()
            except queue.Empty:
                continue
            except Exception:
                logger.exception("a metric could not be recorded with Ray")
