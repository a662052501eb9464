"""One MLflow run for a job, over all its reruns. A tracking server out of reach costs the metrics, never the work."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from medusa.errors import MedusaError
from pipelines.config import Config
from pipelines.credentials import one_line
from pipelines.registry import Registry, RunLog, open_registry

logger = logging.getLogger(__name__)


class JobLog:
    """While open, the run of `key` is RUNNING; it ends as FINISHED, or FAILED where an error passes through."""

    def __init__(self, config: Config, key: str, params: Mapping[str, Any]) -> None:
        self._config = config
        self._key = key
        self._params = params
        self._registry: Registry | None = None
        self._log: RunLog | None = None
        self._told: Mapping[str, float] = {}
        self.run_id: str | None = None

    def __enter__(self) -> Self:
        try:
            self._registry = open_registry(self._config)
            self.run_id = self._registry.run_for(self._key, self._params)
            self._log = RunLog(self._registry.tracking_uri, self.run_id)
        except _unreachable() as error:
            logger.warning("%s is not logged: %s", self._key, one_line(error))
        return self

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Log what has changed since the last call."""
        if self._log is not None and values != self._told:
            self._told = dict(values)
            self._log.metrics(values, step=step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._registry is None or self.run_id is None:
            return
        try:
            self._registry.end_run(self.run_id, failed=error is not None)
        except _unreachable() as fault:
            logger.warning("%s is not logged as ended: %s", self._key, one_line(fault))


def _unreachable() -> tuple[type[Exception], ...]:
    from mlflow.exceptions import MlflowException

    return MlflowException, MedusaError, OSError
