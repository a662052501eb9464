"""Servers to measure: ours and vLLM's, started on loopback and ended again. Knows commands and readiness, no load."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.machine import num_cores
from benchmarks.serving_memory import command_line, family

ROOT = Path(__file__).resolve().parents[1]
READY_S = 600.0  # vLLM compiles at its first start
POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a server is started; `{port}` in its command is the port it is to listen on."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_path: str = "/health"


def ours(*, workdir: Path, dtype: str, settings: Sequence[str] = ()) -> Launch:
    """`medusa serve` with the heads that come with the backbone: `workdir` holds no registry."""
    command = [
        sys.executable, "-m", "deploy.cli", "serve", "--host", "127.0.0.1", "--port", "{port}", f"workdir={workdir}",
        f"backbone.dtype={dtype}", "ray.object_store_mb=100", *settings,
    ]  # fmt: skip
    return Launch(name="ours", command=command)


def vllm(
    *, python: Path, folder: Path, dtype: str, context_length: int, max_batch_size: int, options: Sequence[str] = ()
) -> Launch:
    """vLLM's own server over the same weights; `python` is that of its environment, `options` are its own."""
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", folder.name,
        "--host", "127.0.0.1", "--port", "{port}", "--dtype", dtype, "--max-model-len", str(context_length),
        "--max-num-seqs", str(max_batch_size), *options,
    ]  # fmt: skip
    return Launch(name="vLLM", command=command, environment=vllm_environment(num_cores()))


def vllm_environment(num_threads: int) -> dict[str, str]:
    """What vLLM's CPU build is told outside its arguments: GiB for keys and values, cores, and to call nobody."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads - 1}", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip


class Server:
    """A server that was started here. `log` is a file in `folder`; `close` ends every process of it."""

    def __init__(self, launch: Launch, *, folder: Path, port: int | None = None) -> None:
        self.launch = launch
        self.port = port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{launch.name}.log"
        self._process = self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _start(self) -> subprocess.Popen[bytes]:
        command = [part.replace("{port}", str(self.port)) for part in self.launch.command]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **self.launch.environment}
        with self.log.open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def wait_ready(self, timeout_s: float = READY_S) -> None:
        """Return when the server answers; TimeoutError with the end of its log where it does not, or has ended."""
        deadline = time.monotonic() + timeout_s
        while not _answers(f"{self.url}{self.launch.ready_path}"):
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = self.log.read_text(errors="replace").strip().splitlines()[-5:]
                raise TimeoutError(
                    f"{self.launch.name} did not come up at {self.url}; its log ends: {' | '.join(said)}"
                )
            time.sleep(POLL_S)

    def find(self, title: str) -> int:
        """The process of this server whose command line begins with `title`; LookupError where there is none."""
        for pid in family(self.pid):
            if command_line(pid).startswith(title):
                return pid
        raise LookupError(f"{self.launch.name} has no process {title!r}")

    def kill(self) -> None:
        """All its processes at once, as if its machine were gone."""
        for pid in reversed(family(self.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def restart(self) -> None:
        """The same command on the same port, as a supervisor does it. Returns at once."""
        self._process = self._start()

    def close(self, timeout_s: float = 90.0) -> None:
        below = family(self.pid)
        self._process.terminate()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
        for pid in below[1:]:  # what a server that was itself killed has left behind
            if command_line(pid).startswith(("ray::", "raylet")):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def started(launch: Launch, *, folder: Path) -> Iterator[Server]:
    """A server that answers, ended with the block."""
    server = Server(launch, folder=folder)
    try:
        server.wait_ready()
        yield server
    finally:
        server.close()


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:
        return int(response.status) == 200
    return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
