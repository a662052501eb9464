"""A real MLflow server on a real PostgreSQL, both on this machine, for the time of a block. Knows processes and ports."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipelines.errors import StageError
from pipelines.registry import await_server

DEBIAN = Path("/usr/lib/postgresql")


def postgres_binaries() -> Path | None:
    """The folder of `initdb` and `pg_ctl`: Debian's, or that of the PATH."""
    debian = sorted(DEBIAN.glob("*/bin/initdb")) if DEBIAN.is_dir() else []
    found = str(debian[-1]) if debian else shutil.which("initdb")
    return Path(found).parent if found else None


def missing() -> str | None:
    """Why a server cannot be started here, in words; None where it can."""
    if postgres_binaries() is None:
        return "needs PostgreSQL's server binaries (Debian: apt-get install postgresql)"
    if os.geteuid() == 0 and _system_user() is None:
        return "PostgreSQL refuses to run as root, and there is no user postgres or nobody to run it as"
    return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A fresh cluster in a temporary folder; yields the URI of its database. Stopped at the end, whatever ends the block.

    The folder is its own: PostgreSQL does not run as root, and pytest shuts its folders to everybody but root, again
    whenever another pytest starts.
    """
    binaries, port = postgres_binaries(), free_port()
    assert binaries is not None
    user = _system_user() if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="medusa-postgres-") as made:
        folder = Path(made)
        if user is not None:
            shutil.chown(folder, user)
        yield from _cluster(binaries, folder, port, user)


def _cluster(binaries: Path, folder: Path, port: int, user: str | None) -> Iterator[str]:
    data = folder / "data"

    def call(tool: str, *args: str) -> None:
        command = [str(binaries / tool), *args]
        done = subprocess.run(
            command, user=user, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=120
        )
        assert done.returncode == 0, f"{tool}: {done.stderr.decode()}"

    call("initdb", "-D", str(data), "-U", "medusa", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
    call("pg_ctl", "-D", str(data), "-w", "-t", "60", "-l", str(folder / "log"), "-o", options, "start")
    try:
        yield f"postgresql+psycopg2://medusa@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")


@contextlib.contextmanager
def mlflow_server(folder: Path, store: str) -> Iterator[str]:
    """`mlflow server` with two workers over a database URI, artifacts through the server; yields its own URI."""
    folder.mkdir(parents=True, exist_ok=True)
    uri = f"http://127.0.0.1:{free_port()}"
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--host", "127.0.0.1",
        "--port", uri.rpartition(":")[2], "--workers", "2", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        try:
            _await(uri, server, folder / "log")
            yield uri
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, 15)
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, 9)
                server.wait()


def _await(uri: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the server answers; AssertionError with its log's last lines where it died or takes three minutes."""
    for _ in range(180):
        with contextlib.suppress(StageError):
            await_server(uri, patience_s=0.5)
            return
        if server.poll() is not None:
            break
    raise AssertionError(f"mlflow server did not start: {' / '.join(log.read_text().splitlines()[-5:])}")


def _system_user() -> str | None:
    import pwd

    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)
