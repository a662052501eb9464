"""The Ray Serve deployment, and serving on one machine. A replica is one engine behind its own HTTP routes: no second hop.

`build` is the application that `deploy/serve.yaml` names; its `args` are the configuration of the life cycle.
"""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from deploy.app import create_app
from deploy.replica import load_service
from medusa.errors import MedusaError
from pipelines.cluster import ray_session
from pipelines.config import Config

logger = logging.getLogger(__name__)

APPLICATION = "medusa"
AUTOSCALING = {
    "min_replicas": 1,
    "max_replicas": 4,
    "target_ongoing_requests": 6,  # of a batch of 8: grow before requests wait
    "upscale_delay_s": 10,
    "downscale_delay_s": 120,
}


class ServeError(MedusaError):
    """Serving cannot begin: the port is taken, or no replica comes up."""


# Admission is the engine loop's, so that a refusal is an OpenAI error object; Serve's own plain-text limit lies behind it.
@serve.deployment(
    name="replica",
    autoscaling_config=AUTOSCALING,
    max_ongoing_requests=256,
    max_queued_requests=256,
    graceful_shutdown_timeout_s=60,
    graceful_shutdown_wait_loop_s=0.5,
    health_check_period_s=5,
    health_check_timeout_s=15,
    max_constructor_retry_count=1,
    ray_actor_options={"num_cpus": 1},
)
@serve.ingress()
class Replica:
    """Loads the champion, decodes in a thread of its own, answers over HTTP in the same process."""

    def __init__(self, config: dict[str, Any]) -> None:
        for package in ("medusa", "pipelines", "deploy"):
            logging.getLogger(package).setLevel(logging.INFO)
            logging.getLogger(package).handlers = logging.getLogger("ray.serve").handlers
        settings = Config.model_validate(config)
        self._settings = settings.serve
        self._service = load_service(settings)
        self._service.loop.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._service, self._settings, behind_proxy=True)

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        self._service.loop.check_health()

    def __del__(self) -> None:
        service = getattr(self, "_service", None)
        if service is not None:
            service.loop.stop()


def build(args: dict[str, Any]) -> Application:
    """The application of a Serve config file; `args` is the tree that a YAML configuration holds."""
    return Replica.bind(Config.model_validate(args).model_dump(mode="json"))  # type: ignore[attr-defined]


@contextlib.contextmanager
def serving(config: Config) -> Iterator[str]:
    """Serve on this machine for the time of the block; yields the base URL once the model answers.

    Starts Ray unless it runs, takes one replica (a second would compete for the same cores), and stops what it
    started, whatever ends the block. `serve.port` 0 takes a free one. Raises ServeError.
    """
    host, port = config.serve.host, _free_port(config.serve.host, config.serve.port)
    with ray_session(config), sigterm_interrupts():
        serve.start(
            http_options={"host": host, "port": port}, proxy_location="HeadOnly", logging_config=_quiet_logging()
        )
        try:
            replica = Replica.options(autoscaling_config=None, num_replicas=1)  # type: ignore[attr-defined]
            application = replica.bind(config.model_dump(mode="json"))
            try:
                serve.run(application, name=APPLICATION, route_prefix="/", logging_config=_quiet_logging())
            except RuntimeError as error:
                raise ServeError(f"no replica came up: {_cause()}") from error
            yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
        finally:
            with _uninterrupted():
                serve.shutdown()


def run(config: Config) -> None:
    """Serve until Ctrl-C or SIGTERM, then stop cleanly."""
    try:
        with serving(config) as url:
            logger.info("ready: %s/v1; Ctrl-C stops", url)
            threading.Event().wait()
    except KeyboardInterrupt:
        logger.info("stopped")


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM unwinds the block like Ctrl-C. To be entered when Ray runs: Ray's own handler aborts the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """An impatient second Ctrl-C must not leave replicas behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. ServeError where it is taken or the host is not of this machine."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ServeError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another with --host and --port"
        ) from None


def _quiet_logging() -> dict[str, Any]:
    return {"log_level": "WARNING", "enable_access_log": False}


def _cause() -> str:
    """The replica's own error: the last line of Serve's report of it that names an exception."""
    report = serve.status().applications[APPLICATION].deployments["replica"].message
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    return (named or lines or ["Serve does not say why"])[-1]
