"""The Ray Serve deployment, and serving on one machine. A replica is one engine behind its own HTTP routes: no second hop.

`build` is the application that `deploy/serve.yaml` names; its `args` are the configuration of the life cycle.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray import serve
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from starlette.types import ASGIApp

from deploy.api_keys import KeyRing
from deploy.app import create_app
from deploy.autoscaling import RUNNING, SLOTS, WAITING
from deploy.heads import STAND_INS
from deploy.outlets import RayOutlet
from deploy.replica import ModelHost, overlaid
from deploy.service import Service
from medusa.errors import MedusaError
from pipelines.cluster import ray_session
from pipelines.config import Config, ServeSection
from pipelines.credentials import without_credentials
from pipelines.errors import ConfigError
from pipelines.registry import tracking_uri

logger = logging.getLogger(__name__)

APPLICATION, DEPLOYMENT = "medusa", "replica"
SERVE_FAILS = (ray.exceptions.RayError, RayServeException, TimeoutError)
LEAST_LIMIT = 256  # requests
AT_ONCE_S = 0.5  # a drain that takes no longer needs no word to the user
AUTOSCALING: dict[str, Any] = {
    "min_replicas": 1,
    "max_replicas": 4,
    "upscale_delay_s": 10,
    "downscale_delay_s": 120,
    "policy": {
        "policy_function": "deploy.autoscaling:SlotUsePolicy",
        "policy_kwargs": {"target_use": 0.75, "low_use": 0.5},
    },
}


class ServeError(MedusaError):
    """Serving cannot begin: the port is taken, or no replica comes up."""


@serve.deployment(
    name=DEPLOYMENT,
    autoscaling_config=AUTOSCALING,
    graceful_shutdown_wait_loop_s=0.5,
    health_check_period_s=5,
    health_check_timeout_s=15,
    max_constructor_retry_count=1,
    ray_actor_options={"num_cpus": 1},
)
@serve.ingress()
class Replica:
    """Loads the champion and follows it, decodes in a thread of its own, answers over HTTP in the same process."""

    def __init__(self, config: dict[str, Any]) -> None:
        for package in ("medusa", "pipelines", "deploy"):
            logging.getLogger(package).setLevel(logging.INFO)
            logging.getLogger(package).handlers = logging.getLogger("ray.serve").handlers
        valid = Config.model_validate(config)
        self._settings = valid.serve
        self._host = ModelHost(valid, _make_app, outlets=[RayOutlet()])

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._host.app

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """`user_config` of the deployment: keys of the section `serve`, changed without a new replica."""
        await asyncio.to_thread(self._host.reconfigure, user_config)
        if (told := beyond_limits(self._settings, user_config)) is not None:
            logger.warning("%s", told)

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        self._host.loop.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `deploy.autoscaling` decides on."""
        load = self._host.loop.load
        return {RUNNING: load.running, WAITING: load.waiting, SLOTS: load.slots}

    async def status(self) -> dict[str, str]:
        """What `/health` says: the version that answers, and why it is not the one that it should be."""
        return self._host.status()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests; True when those that run have ended, False when `timeout_s` was not enough.

        Only for a replica that has no successor: where it has, Serve stops sending it requests and waits by itself.
        """
        return await asyncio.to_thread(self._host.loop.drain, timeout_s)

    def __del__(self) -> None:
        host = getattr(self, "_host", None)
        if host is not None:
            host.stop()


def _make_app(service: Service, settings: ServeSection, keys: KeyRing) -> ASGIApp:
    return create_app(service, settings, keys=keys, behind_proxy=True)


def build(args: dict[str, Any]) -> Application:
    """The application of a Serve config file; `args` is the tree that a YAML configuration holds.

    ConfigError for a relative `workdir`: Serve calls this in a folder of Ray's own, which nobody can have meant.
    """
    workdir = args.get("workdir")
    if workdir is not None and not Path(workdir).expanduser().is_absolute():
        raise ConfigError(f"args.workdir {str(workdir)!r} is relative, to a folder of Ray's own; give an absolute path")
    return application(Config.model_validate(args))


def application(config: Config, **options: Any) -> Application:
    """A replica's deployment over `config`; `options` are Ray Serve's, over those that stand above."""
    options = {"graceful_shutdown_timeout_s": config.serve.drain_s, **_limits(config.serve)} | options
    return Replica.options(**options).bind(config.model_dump(mode="json"))  # type: ignore[attr-defined]


def _limits(settings: ServeSection) -> dict[str, int]:
    """Of Serve's own admission, whose refusals are plain text: behind the engine loop's, which are OpenAI error objects."""
    limit = max(LEAST_LIMIT, 2 * (settings.max_batch_size + settings.max_waiting))
    return {"max_ongoing_requests": limit, "max_queued_requests": limit}


def beyond_limits(settings: ServeSection, user_config: Mapping[str, Any]) -> str | None:
    """What to say where a `user_config` admits more than Serve's own limits, made from `settings`, let through; else None.

    A replica is not told reliably of limits that the deployment sets itself, so this can only be said with an unless.
    """
    admits = overlaid(settings, user_config)
    num_admitted, limit = admits.max_batch_size + admits.max_waiting, _limits(settings)["max_ongoing_requests"]
    if num_admitted < limit:
        return None
    return (
        f"user_config admits {num_admitted} requests (max_batch_size {admits.max_batch_size}, max_waiting "
        f"{admits.max_waiting}), Ray Serve lets {limit} through and refuses the others in plain text, unless the deployment's "
        "max_ongoing_requests and max_queued_requests are higher; set them, or set max_waiting in args.serve"
    )


@contextlib.contextmanager
def serving(config: Config) -> Iterator[str]:
    """Serve on this machine for the time of the block; yields the base URL once the model answers.

    Starts Ray unless it runs, takes one replica (a second would compete for the same cores), and stops what it
    started, whatever ends the block: answers under way are finished first, for up to `serve.drain_s`, while new requests
    get 503; another Ctrl-C cuts them off. `serve.port` 0 takes a free one. Raises ServeError.
    """
    host, port = config.serve.host, _free_port(config.serve.host, config.serve.port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it tells each start twice, the second time as a refusal
    with ray_session(config), sigterm_interrupts():
        serve.start(
            http_options={"host": host, "port": port}, proxy_location="HeadOnly", logging_config=_quiet_logging()
        )
        try:
            single = application(config, autoscaling_config=None, num_replicas=1)
            try:
                try:
                    serve.run(single, name=APPLICATION, route_prefix="/", logging_config=_quiet_logging())
                except RuntimeError as error:
                    report = serve.status().applications[APPLICATION].deployments[DEPLOYMENT].message
                    raise ServeError(f"no replica came up: {cause_of(report)}") from error
                yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
            finally:  # of `serve.run` too: a replica answers a little before Serve says that it runs
                _finish_answers(config.serve.drain_s)
        finally:
            with _uninterrupted():
                serve.shutdown()


def _finish_answers(timeout_s: float) -> None:
    """Return when the one replica is idle and gone. `serve.shutdown` would end the proxy first, and so cut streams."""
    with contextlib.suppress(KeyboardInterrupt):
        try:
            if not _has_replica():
                return
            if not _drained(AT_ONCE_S):
                logger.info("answers under way are finished first, for up to %g s; Ctrl-C cuts them off", timeout_s)
                if not _drained(timeout_s):
                    logger.warning("answers were still under way after %g s and are cut off", timeout_s)
                    return
            serve.delete(APPLICATION)  # waits until the last bytes of the last answer have left
        except SERVE_FAILS as error:
            logger.warning("the replica could not finish its answers: %s", str(error).splitlines()[0])


def _has_replica() -> bool:
    application = serve.status().applications.get(APPLICATION)
    deployment = application.deployments.get(DEPLOYMENT) if application else None
    return deployment is not None and any(state == "RUNNING" for state in deployment.replica_states)


def _drained(timeout_s: float) -> bool:
    replica = serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
    return bool(replica.drain.remote(timeout_s).result(timeout_s=timeout_s + 10))


def _served(config: Config) -> str:
    """What is answered with, in words: a mistyped `workdir` would else serve the default heads in silence."""
    status = serve.get_deployment_handle(DEPLOYMENT, APPLICATION).status.remote().result(timeout_s=10)
    return describe_served(status, config.serve.alias, without_credentials(tracking_uri(config)))


def describe_served(status: Mapping[str, str], alias: str, registry: str) -> str:
    """A replica's status in words."""
    version = status["version"]
    if "champion_error" in status:
        return f"{STAND_INS.get(version, version)}: {status['champion_error']}"
    return version if version not in STAND_INS else f"{STAND_INS[version]}: no version is {alias!r} in {registry}"


def run(config: Config) -> None:
    """Serve until Ctrl-C or SIGTERM, then finish the answers under way and stop cleanly."""
    try:
        with serving(config) as url:
            logger.info("ready: %s/v1; Ctrl-C stops", url)
            with contextlib.suppress(*SERVE_FAILS, MedusaError):  # a word to the user, which must not end a server
                logger.info("serving %s", _served(config))
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


def cause_of(report: str) -> str:
    """A replica's own error: the last line of Serve's report of it that names an exception and says more than that one was
    raised elsewhere."""
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"((\w+\.)+[A-Z]\w*|\w*(Error|Exception)): (?!Traceback )", line)]
    return (named or lines or ["Serve does not say why"])[-1]
