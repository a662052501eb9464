"""Metrics on their way from a worker to MLflow. A server out of reach costs a warning, never the training.

What is logged goes into a journal, which every checkpoint carries; a thread sends it on. So metrics survive a worker,
a driver, and a server that is away for a while.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tenacity

from pipelines.credentials import one_line, without_credentials
from pipelines.errors import TrackingUnreachable

logger = logging.getLogger(__name__)

JOURNAL = "metrics.jsonl"
SEND_EVERY_S = 2.0
_TRIES, _WAIT_S = 3, 0.5
_AT_ONCE = 900  # MLflow takes 1000 metrics in one request

# What MLflow's client calls a server that does not answer, or answers that it cannot.
AWAY = (
    "INTERNAL_ERROR",
    "TEMPORARILY_UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "REQUEST_LIMIT_EXCEEDED",
    "RESOURCE_EXHAUSTED",
)
# One request is tried for seconds, not for minutes: trying again is done here, where training does not wait for it.
_HTTP = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Metrics of one step; `at_ms` is when they were measured."""

    step: int
    at_ms: int
    values: dict[str, float]


@dataclass(kw_only=True)
class Journal:
    """All entries of a run in order; the first `num_sent` have reached MLflow."""

    entries: list[Entry] = field(default_factory=list)
    num_sent: int = 0

    def add(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: float(value) for name, value in values.items()}
        self.entries.append(Entry(step=step, at_ms=int(time.time() * 1000), values=finite))

    @property
    def waiting(self) -> list[Entry]:
        return self.entries[self.num_sent :]

    def save(self, file: Path) -> None:
        """Only what still waits: MLflow keeps the rest."""
        file.write_text("".join(json.dumps(vars(entry)) + "\n" for entry in self.waiting))

    @staticmethod
    def load(file: Path) -> Journal:
        lines = file.read_text().splitlines() if file.is_file() else []
        return Journal(entries=[Entry(**json.loads(line)) for line in lines])


Send = Callable[[list[Entry]], None]


class Sender:
    """Sends a journal from a thread, in order. The first failure is told once; then it tries again until `close`."""

    def __init__(self, journal: Journal, send: Send, *, where: str) -> None:
        self.journal = journal
        self._send, self._where = send, without_credentials(where)
        self._stop = threading.Event()
        self._away = False
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> int:
        """Send what waits, trying a few times; the number of entries that could not be sent."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # told already
            _patiently(self._send_waiting)
        return len(self.journal.waiting)

    def _run(self) -> None:
        while not self._stop.wait(SEND_EVERY_S):
            with contextlib.suppress(Exception):  # told below; the next round tries again
                self._send_waiting()

    def _send_waiting(self) -> None:
        waiting = self.journal.waiting
        if not waiting:
            return
        try:
            self._send(waiting)
        except Exception as error:
            if not self._away:
                logger.warning(
                    "MLflow at %s is out of reach (%s); training goes on, metrics are sent later",
                    self._where, one_line(error),
                )  # fmt: skip
            self._away = True
            raise
        self.journal.num_sent += len(waiting)
        if self._away:
            logger.warning("MLflow at %s is back; %d entries of metrics sent", self._where, len(waiting))
        self._away = False


def mlflow_sender(tracking_uri: str, run_id: str) -> Send:
    """Entries → a run of an MLflow server or database."""
    with brief_requests():
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        client = MlflowClient(tracking_uri=tracking_uri)

    def send(entries: list[Entry]) -> None:
        metrics = [
            Metric(name, value, entry.at_ms, entry.step) for entry in entries for name, value in entry.values.items()
        ]
        with brief_requests():
            for start in range(0, len(metrics), _AT_ONCE):
                client.log_batch(run_id, metrics=metrics[start : start + _AT_ONCE])

    return send


@contextlib.contextmanager
def brief_requests() -> Iterator[None]:
    """Within the block MLflow gives a server up after seconds, unless the user has set otherwise."""
    added = [name for name in _HTTP if name not in os.environ]
    os.environ.update({name: _HTTP[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _patiently(call: Callable[[], Any]) -> Any:
    """`call`, tried a few times with growing pauses; the last error is raised. What was found unreachable was waited for."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_not_exception_type(TrackingUnreachable),
        stop=tenacity.stop_after_attempt(_TRIES),
        wait=tenacity.wait_exponential(multiplier=_WAIT_S, max=5),
        reraise=True,
    )
    return retrying(call)


def within_reach(call: Callable[[], Any], where: str) -> Any | None:
    """What `call` returns, or None with one warning where MLflow does not answer after a few tries.

    Only for what is about reaching a server: a call that is refused for another reason raises.
    """
    from mlflow.exceptions import MlflowException

    try:
        with brief_requests():
            return _patiently(call)
    except (MlflowException, OSError, TrackingUnreachable) as error:
        code = getattr(error, "error_code", AWAY[0])
        if not where.startswith(("http:", "https:")) or code not in AWAY:
            raise
        logger.warning(
            "MLflow at %s is out of reach (%s); training goes on without it",
            without_credentials(where),
            one_line(error),
        )
        return None


def git_revision() -> str:
    """Commit of the sources, `+` where they have changes; MEDUSA_GIT_REVISION where they lie outside a repository."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found = ""
    return found or os.environ.get("MEDUSA_GIT_REVISION", "unknown")
