"""The Ray that a stage runs on: a cluster that is there, or one in this process that ends with the stage."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from pipelines.config import Config
from pipelines.errors import ConfigError, StageError

# Read once by Ray, DeepSpeed, MLflow and tokenizers when they start; what the user has set wins.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # an in-process Ray listens on loopback alone and writes no token for others to trip over
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
}
MIN_LOGICAL_CPUS = 4


@contextlib.contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Ray for the time of the block. A Ray that is already running in this process is used and left alone;
    one that is started here is stopped, whatever ends the block. Raises StageError when a cluster cannot be reached.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    _start(config)
    try:
        _refuse_local_settings(config)
        yield
    finally:
        ray.shutdown()


def _start(config: Config) -> None:
    import ray

    settings = config.ray
    if settings.address is not None:
        try:
            ray.init(address=settings.address, logging_level=logging.WARNING)
        except ConnectionError as error:
            reason = str(error).splitlines()[0]
            raise StageError(
                f"no Ray cluster at ray.address={settings.address} ({reason}); start one, or set it to null"
            ) from None
        return
    ray.init(
        address="local",
        num_cpus=settings.num_cpus or max(MIN_LOGICAL_CPUS, os.cpu_count() or 1),
        object_store_memory=None if settings.object_store_mb is None else settings.object_store_mb * 2**20,
        include_dashboard=False,
        log_to_driver=False,  # stages tell of their progress themselves; workers' logs lie in Ray's session folder
        logging_level=logging.WARNING,
    )


def _refuse_local_settings(config: Config) -> None:
    """SQLite in the working directory serves one machine; on several each node would see a file of its own."""
    import ray

    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    tracking = config.registry.tracking_uri
    if nodes > 1 and (tracking is None or tracking.startswith("sqlite:")):
        raise ConfigError(
            f"registry.tracking_uri is SQLite, which {nodes} nodes cannot share; set it to an MLflow server"
        )
