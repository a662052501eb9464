"""The Ray that a stage runs on: a cluster that is there, or one in this process that ends with the stage."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from medusa.errors import MedusaError
from pipelines.capacity import Need, require
from pipelines.config import Config
from pipelines.credentials import one_line, without_credentials
from pipelines.errors import ConfigError, StageError
from pipelines.failures import full_disk
from pipelines.nodes import reachable, refuse_job_copy, refuse_local_settings
from pipelines.stage import Progress, StageResult, Step, log_progress, quiet_libraries, unrepeated

Result = TypeVar("Result", bound=StageResult)
Measured = TypeVar("Measured")

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
            f"{name}={without_credentials(address)} is not a node of a cluster: give host:port, auto or local as "
            "ray.address, or submit with `ray job submit --working-dir . -- python -m pipelines.run …`"
        )
    return address


def _knock(address: str) -> None:
    """ConnectionError where nothing listens: `ray.init` would try for minutes, and then end the process."""
    from ray._private.services import canonicalize_bootstrap_address  # how `ray.init` reads "auto"

    host, _, port = str(canonicalize_bootstrap_address(address)).rpartition(":")
    if not reachable((host.strip("[]"), int(port))):
        raise ConnectionError(f"nothing listens at {host}:{port}")


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
            _knock(address)
            ray.init(address=address, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            reason = str(error).strip().splitlines()[0]
            name = f"ray.address={address}" if settings.address else f"RAY_ADDRESS={address}"
            raise StageError(f"no Ray cluster at {name} ({reason}); start one, or set ray.address to local") from None
        return
    try:
        ray.init(
            address="local",
            num_cpus=settings.num_cpus or max(MIN_LOGICAL_CPUS, os.cpu_count() or 1),
            object_store_memory=None if settings.object_store_mb is None else settings.object_store_mb * 2**20,
            include_dashboard=False,
            log_to_driver=False,  # stages tell of their progress themselves; workers' logs lie in Ray's session folder
            logging_level=logging.WARNING,
        )
    except Exception as error:  # a bare Exception is what Ray raises
        if "timed out during startup" not in str(error):
            raise
        raise StageError(
            "Ray did not start in time: the machine is too busy, or short of memory; run this again"
        ) from error


def run_stage(name: str, run: Callable[[Config, Progress], Result], config: Config, progress: Progress) -> Result:
    """`run`, which is stage `name`: here, or, where `ray.measure_on` says so, in a task with those resources.

    A full disk, wherever the stage met it, is a StageError of one line, and so is what MLflow refuses.
    """
    refuse_job_copy(config)
    try:
        return _run(name, run, config, unrepeated(progress))
    except MedusaError:
        raise
    except Exception as error:
        from mlflow.exceptions import MlflowException

        if (told := full_disk(error)) is not None:
            raise StageError(f"{told}, and run this again: what was finished is kept") from error
        if isinstance(error, MlflowException):
            raise StageError(f"MLflow refuses: {one_line(error, limit=300)}") from error
        raise


def _run(name: str, run: Callable[[Config, Progress], Result], config: Config, progress: Progress) -> Result:
    if name not in MEASURED or not config.ray.measure_on:
        return run(config, progress)
    if not config.workdir.is_dir():  # before nodes are asked for it, which makes it
        raise StageError(
            f"no workdir at {config.workdir} for {name} to read; run the stages before it, or correct workdir"
        )
    # A stage that runs as `__main__` here is found under its own name alone elsewhere.
    named: Callable[..., Result] = importlib.import_module(f"pipelines.{name}").run
    return measured(name, named, config, progress)


def measured(
    what: str, measure: Callable[..., Measured], config: Config, progress: Progress, **inputs: Any
) -> Measured:
    """`measure(config, progress=progress, **inputs)`: here, or, where `ray.measure_on` says so, in a task with those
    resources. `measure` is a function that every node can import, and paths in `inputs` lie in the working directory.

    Raises what `measure` raises, StageError where the cluster lacks the resources.
    """
    if not config.ray.measure_on:
        return measure(config, progress=progress, **inputs)
    import_environment(config)
    import ray

    wanted = dict(config.ray.measure_on)
    need = Need(what=what, count=1, each=dict(wanted), lower="ray.measure_on")
    cpus, gpus = wanted.pop("CPU", 1.0), wanted.pop("GPU", 0.0)
    with ray_session(config):
        require(config, need)
        task: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, resources=wanted, max_retries=2)(_measure)
        progress(Step(done=0, total=1, note=f"on a node with {need.share}"))
        try:
            found: Measured = ray.get(task.remote(measure, config.model_dump_json(), inputs))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
    return found


def _measure(measure: Callable[..., Measured], config: str, inputs: dict[str, Any]) -> Measured:
    """In a Ray worker, whose log a cluster's driver shows."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_libraries()
    return measure(Config.model_validate_json(config), progress=log_progress, **inputs)
