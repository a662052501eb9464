"""A real Ray cluster of several nodes on this machine, its Jobs API on loopback, all on ports of its own.

Knows `ray start`, nothing of what runs on it. Each node has a folder of its own to run in, so that
`/proc/self/cwd/x` names another place on each: a path that the nodes do not share.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

_READY_S = 180
_STORE_BYTES = 100 * 2**20
# What would tie the cluster to the checkout that the tests run in, or to a cluster of the user's.
_NOT_INHERITED = {"PYTHONPATH", "RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"}


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, all different, from below the range that the system deals out by itself: it could
    deal one to another process before its owner here has begun to listen.
    """
    found: set[int] = set()
    while len(found) < count:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as one:
            one.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)


def wait_until(true: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.2)


def answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:
        return response.status == 200
    return False


class LocalCluster:
    """A head and nodes that join it. `close` ends every process that was started here, and removes its folder."""

    def __init__(self, *, num_cpus: int = 2) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets want short paths
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        port, dashboard, client = free_ports(3)
        self.address = f"127.0.0.1:{port}"
        self.jobs_address = f"http://127.0.0.1:{dashboard}"
        head = [
            "--head", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
            f"--ray-client-server-port={client}", "--include-dashboard=true",
        ]  # fmt: skip
        try:
            self._start("head", head, num_cpus=num_cpus, resources={})
            wait_until(lambda: answers(f"{self.jobs_address}/api/version"), timeout_s=_READY_S, what="the Jobs API")
        except BaseException:
            self.close()
            raise

    def add_node(self, name: str, *, num_cpus: int = 2, resources: Mapping[str, float] | None = None) -> None:
        """Start another node and return when the cluster has it: `ray start` says so after it has registered."""
        self._start(name, [f"--address={self.address}"], num_cpus=num_cpus, resources=resources or {})
        log, process = self.folder / f"{name}.log", self._nodes[name]

        def joined() -> bool:
            assert process.poll() is None, f"node {name} ended at once:\n{log.read_text()}"
            return "Ray runtime started" in log.read_text()

        wait_until(joined, timeout_s=_READY_S, what=f"node {name}")

    def cwd(self, name: str) -> Path:
        return self.folder / name

    def kill(self, name: str) -> None:
        """The node is gone at once, as if its machine were."""
        node = self._nodes.pop(name)
        for process in _descendants(node.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        node.kill()
        node.wait()

    def close(self) -> None:
        for name in reversed(list(self._nodes)):
            self.kill(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name: str, arguments: list[str], *, num_cpus: int, resources: Mapping[str, float]) -> None:
        (agent,) = free_ports(1)
        assert name not in self._nodes
        cwd = self.cwd(name)
        cwd.mkdir()
        listed = ", ".join(f'"{key}": {value}' for key, value in resources.items())
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, "--block", "--node-ip-address=127.0.0.1",
            f"--num-cpus={num_cpus}", "--num-gpus=0", f"--object-store-memory={_STORE_BYTES}",
            f"--dashboard-agent-listen-port={agent}", "--min-worker-port=0", "--max-worker-port=0",
            f"--resources={{{listed}}}", "--disable-usage-stats",
            # Its own, or the nodes of one machine delete each other's copies of a job's sources.
            f"--temp-dir={cwd / 'ray'}",
        ]  # fmt: skip
        with (self.folder / f"{name}.log").open("wb") as log:
            self._nodes[name] = subprocess.Popen(
                command, cwd=cwd, env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def environment(self) -> dict[str, str]:
        """What the nodes, and so the jobs, inherit: this Python first on the PATH."""
        kept = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
        return {**kept, "PATH": path, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}


def _descendants(pid: int) -> list[int]:
    """The processes below `pid`, the nearest first."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += [int(child) for child in (task / "children").read_text().split()]
    return children + [below for child in children for below in _descendants(child)]


@contextlib.contextmanager
def local_cluster(**options: int) -> Iterator[LocalCluster]:
    cluster = LocalCluster(**options)
    try:
        yield cluster
    finally:
        cluster.close()
