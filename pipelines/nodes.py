"""What the nodes of a cluster share: each is asked, by a task pinned to it, before work begins. Starts no Ray."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines.config import Config
from pipelines.credentials import without_credentials
from pipelines.errors import ConfigError, StageError

logger = logging.getLogger(__name__)

_NODE_TIMEOUT_S = 120.0
_CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class _Report:
    """What a node found."""

    runs_code: bool
    sees_workdir: bool
    reaches_server: bool


def alive() -> list[dict[str, Any]]:
    """The nodes of the Ray that this process is connected to, as `ray.nodes` tells of them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


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
    nodes = alive()
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
                f"registry.tracking_uri {without_credentials(tracking)} is not reached from node {node}; give an address "
                "that every node reaches"
            )


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
