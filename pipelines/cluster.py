"""The Ray that a stage runs on: a cluster that is there, or one in this process that ends with the stage.

Asks first, starts afterwards: what the nodes cannot see, or the cluster cannot give, is refused by name before work begins.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pipelines.config import Config
from pipelines.errors import ConfigError, StageError
from pipelines.stage import Progress, StageResult, Step, log_progress, quiet_libraries

logger = logging.getLogger(__name__)

Result = TypeVar("Result", bound=StageResult)

# Read once by Ray, DeepSpeed, MLflow and tokenizers when they start; what the user has set wins.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
}
# An in-process Ray listens on loopback alone and writes no token for others to trip over; a cluster has its own say.
IN_PROCESS_ENVIRONMENT = {"RAY_AUTH_MODE": "disabled"}
MIN_LOGICAL_CPUS = 4
MEASURED = ("calibrate", "evaluate")  # stages of one process that want the device which the heads will serve on
_NODE_TIMEOUT_S = 120.0
_CONNECT_TIMEOUT_S = 5.0
_TELL_EVERY_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Need:
    """`count` shares of `each` (Ray's resource names → amounts), held at once. `lower` says which settings to lower."""

    what: str
    count: int
    each: Mapping[str, float]
    lower: str
    strategy: str = "PACK"

    def __str__(self) -> str:
        return f"{self.count} × {_told(self.each)}"


@dataclass(frozen=True, kw_only=True)
class _Report:
    """What a node found."""

    runs_code: bool
    sees_workdir: bool
    reaches_server: bool


@contextlib.contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Ray for the time of the block. A Ray that is already running in this process is used and left alone;
    one that is started here is stopped, whatever ends the block. Raises StageError when a cluster cannot be reached,
    ConfigError for settings that its nodes cannot share.
    """
    refuse_job_copy(config)
    import_environment(config)
    import ray

    if ray.is_initialized():
        yield
        return
    _start(config)
    try:
        refuse_local_settings(config)
        yield
    finally:
        ray.shutdown()


def cluster_address(config: Config) -> str | None:
    """Where the cluster is; None where Ray runs in this process. Raises ConfigError for an address of another kind."""
    setting = config.ray.address
    address = None if setting == "local" else setting or os.environ.get("RAY_ADDRESS") or None
    if address is not None and "://" in address:
        name = "ray.address" if setting else "RAY_ADDRESS"
        raise ConfigError(
            f"{name}={address} is not a node of a cluster: give host:port, auto or local as ray.address, or submit with "
            "`ray job submit --working-dir . -- python -m pipelines.run …`"
        )
    return address


def import_environment(config: Config) -> None:
    """What Ray and the others read when they are imported."""
    in_process = IN_PROCESS_ENVIRONMENT if cluster_address(config) is None else {}
    for name, value in (ENVIRONMENT | in_process).items():
        os.environ.setdefault(name, value)


def _start(config: Config) -> None:
    import ray

    settings = config.ray
    address = cluster_address(config)
    if address is not None:
        try:
            ray.init(address=address, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            reason = str(error).strip().splitlines()[0]
            name = f"ray.address={address}" if settings.address else f"RAY_ADDRESS={address}"
            raise StageError(f"no Ray cluster at {name} ({reason}); start one, or set ray.address to local") from None
        return
    ray.init(
        address="local",
        num_cpus=settings.num_cpus or max(MIN_LOGICAL_CPUS, os.cpu_count() or 1),
        object_store_memory=None if settings.object_store_mb is None else settings.object_store_mb * 2**20,
        include_dashboard=False,
        log_to_driver=False,  # stages tell of their progress themselves; workers' logs lie in Ray's session folder
        logging_level=logging.WARNING,
    )


# What the nodes must share


def refuse_job_copy(config: Config) -> None:
    """ConfigError for a workdir in the copy of the sources that Ray unpacks for a submitted job, and deletes again."""
    here = Path.cwd()
    if here.parent.name == "working_dir_files" and config.workdir.is_relative_to(here):
        raise ConfigError(
            f"workdir {config.workdir.relative_to(here)} would lie in the job's copy of the sources, which Ray deletes; "
            "give an absolute path, on several nodes one that all of them mount"
        )


def refuse_local_settings(config: Config) -> None:
    """ConfigError where a node would see a file, folder or server of its own under a name that all must share.

    Every node is asked: a marker that this process writes into workdir must be there, and the MLflow server, if this
    process reaches it, must be reached.
    """
    nodes = _alive()
    if len(nodes) < 2:
        return
    tracking = config.registry.tracking_uri
    if tracking is None or tracking.startswith("sqlite:"):
        raise ConfigError(
            f"registry.tracking_uri is SQLite, which {len(nodes)} nodes cannot share; set it to an MLflow server"
        )
    server = _endpoint(tracking)
    config.workdir.mkdir(parents=True, exist_ok=True)
    marker = config.workdir / f".seen-{uuid.uuid4().hex}"
    marker.touch()
    try:
        reports = _ask_nodes(nodes, str(marker), server if server and reachable(server) else None)
    finally:
        marker.unlink()
    for node, report in reports.items():
        if not report.runs_code:
            raise StageError(
                f"node {node} does not have this code: install the package there, or submit with "
                "`ray job submit --working-dir . -- python -m pipelines.…`"
            )
        if not report.sees_workdir:
            raise ConfigError(
                f"workdir {config.workdir} is not shared: node {node} does not see what this one writes there; "
                "set workdir to a folder that every node mounts (NFS or the like)"
            )
        if not report.reaches_server:
            raise ConfigError(
                f"registry.tracking_uri {tracking} is not reached from node {node}; give an address that every node reaches"
            )


def _alive() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _ask_nodes(nodes: list[dict[str, Any]], marker: str, server: tuple[str, int] | None) -> dict[str, _Report]:
    """Each node's report by the node's name; a node that goes away meanwhile is left out."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # A function of this scope is sent as it is, so that a node without our package can say so, and one with it need not
    # import torch for a glance at a folder.
    def look() -> tuple[bool, bool, bool]:
        deadline = time.monotonic() + 5  # a network folder may need a moment to show a new file
        while not (sees := os.path.exists(marker)) and time.monotonic() < deadline:  # noqa: PTH110  nothing else to import
            time.sleep(0.25)
        reaches = True
        if server is not None:
            try:
                socket.create_connection(server, timeout=5).close()
            except OSError:
                reaches = False
        return importlib.util.find_spec("pipelines") is not None, sees, reaches

    probe = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {
        f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})": probe.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        ).remote()
        for node in nodes
    }
    reports = {}
    for name, answer in asked.items():
        try:
            runs_code, sees, reaches = ray.get(answer, timeout=_NODE_TIMEOUT_S)
            reports[name] = _Report(runs_code=runs_code, sees_workdir=sees, reaches_server=reaches)
        except ray.exceptions.GetTimeoutError:
            raise StageError(f"node {name} did not answer within {_NODE_TIMEOUT_S:g} s; is it overloaded?") from None
        except ray.exceptions.RayError as error:
            logger.warning("node %s went away: %s", name, str(error).strip().splitlines()[0])
    return reports


def reachable(server: tuple[str, int]) -> bool:
    try:
        socket.create_connection(server, timeout=_CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _endpoint(uri: str) -> tuple[str, int] | None:
    """Host and port of an HTTP URI; None for any other."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        return None
    return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


# What the cluster must give


def require(config: Config, need: Need) -> None:
    """Return once the cluster has what a stage will ask for: nothing waits in silence for what cannot come.

    What its nodes can never give is refused (StageError names what to lower), with `ray.wait_s` only after an autoscaler
    had that long to add nodes. What is in use by others is waited for, and told.
    """
    if _room(need) < need.count:
        _wait_for_nodes(config, need)
        refuse_local_settings(config)  # of the new nodes too
    _wait_until_free(need)


def _room(need: Need) -> int:
    return room_for(need, [node["Resources"] for node in _alive()])


def _wait_for_nodes(config: Config, need: Need) -> None:
    from ray.autoscaler.sdk import request_resources

    began = told = time.monotonic()
    if config.ray.wait_s:
        logger.info("%s need %s, there is room for %d: waiting for nodes", need.what, need, _room(need))
        request_resources(bundles=[dict(need.each)] * need.count)
    try:
        while (room := _room(need)) < need.count:
            now = time.monotonic()
            if now - began >= config.ray.wait_s:
                waited = f" after {config.ray.wait_s:g} s (ray.wait_s)" if config.ray.wait_s else ""
                raise StageError(f"{need.what} need {need}; Ray has room for {room}{waited}; {_mend(config, need)}")
            if now - told >= _TELL_EVERY_S:
                logger.info("still waiting for nodes: %s need %s, there is room for %d", need.what, need, room)
                told = now
            time.sleep(0.5)
    finally:
        if config.ray.wait_s:
            request_resources(bundles=[])


def room_for(need: Need, nodes: list[Mapping[str, float]]) -> int:
    """How many of the shares fit on nodes of these resources, were they empty. Pure."""
    fits = [_fitting(need.each, node) for node in nodes]
    if need.strategy == "STRICT_PACK":
        return max(fits, default=0)
    if need.strategy == "STRICT_SPREAD":
        return sum(fit > 0 for fit in fits)
    return sum(fits)


def _fitting(each: Mapping[str, float], node: Mapping[str, float]) -> int:
    shares = [int(node.get(name, 0) / amount + 1e-6) for name, amount in each.items() if amount > 0]
    return min(shares, default=2**31)


def _mend(config: Config, need: Need) -> str:
    if need.each.get("GPU") and not any(node["Resources"].get("GPU") for node in _alive()):
        return "it has no GPU: add a node with one, or set what asks for GPUs to none"
    more = "raise ray.num_cpus" if cluster_address(config) is None else "add nodes"
    return f"lower {need.lower}, or {more}"


def _wait_until_free(need: Need) -> None:
    """Tell while others hold what is needed. Ray itself places the shares; this only watches the sum."""
    import ray

    told = time.monotonic() - _TELL_EVERY_S + 5  # what a stage before has just given back takes a moment to show
    while True:
        free = ray.available_resources()
        short = {
            name: amount * need.count
            for name, amount in need.each.items()
            if free.get(name, 0) < amount * need.count - 1e-6
        }
        if not short:
            return
        if time.monotonic() - told >= _TELL_EVERY_S:
            others = {name: free.get(name, 0.0) for name in short}
            logger.info("%s wait for %s; free are %s, the rest is in use", need.what, _told(short), _told(others))
            told = time.monotonic()
        time.sleep(0.5)


def _told(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items())


# Where a stage runs


def run_stage(name: str, run: Callable[[Config, Progress], Result], config: Config, progress: Progress) -> Result:
    """`run`, which is stage `name`: here, or, where `ray.measure_on` says so, in a task with those resources."""
    refuse_job_copy(config)
    if name not in MEASURED or not config.ray.measure_on:
        return run(config, progress)
    import_environment(config)
    import ray

    wanted = dict(config.ray.measure_on)
    need = Need(what=name, count=1, each=dict(wanted), lower="ray.measure_on")
    cpus, gpus = wanted.pop("CPU", 1.0), wanted.pop("GPU", 0.0)
    with ray_session(config):
        require(config, need)
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, resources=wanted, max_retries=2)(_measure)
        progress(Step(done=0, total=1, note=f"on a node with {_told(need.each)}"))
        try:
            measured: Any = ray.get(task.remote(name, config.model_dump_json()))
            return measured
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None


def _measure(name: str, config: str) -> StageResult:
    """In a Ray worker; its log goes to the driver's."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_libraries()
    return importlib.import_module(f"pipelines.{name}").run(Config.model_validate_json(config), log_progress)
