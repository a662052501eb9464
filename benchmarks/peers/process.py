"""The parent's side of `lines.py`: start an engine's process, ask it, let it sleep meanwhile. Knows no engine."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.command import console
from benchmarks.contenders import Turn

LINES = Path(__file__).with_name("lines.py")
READY_S = 600.0  # vLLM compiles at its first start
ANSWER_S = 600.0
CLOSE_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How an engine is started: `python` is that of its environment, `engine` a file as `lines.py` wants it."""

    name: str
    python: Path
    engine: Path
    settings: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    max_batch_size: int = 1


class Peer:
    """A contender in a process group of its own, stopped (SIGSTOP) except while it answers.

    What an engine does behind its answer, spinning threads and polling processes, would take cores from whoever is timed
    next. A stopped group whose parent dies is woken by the kernel and hung up, so none is left behind. Errors are OSErrors that
    quote the end of the engine's log in `folder`: ChildProcessError where it has ended, TimeoutError where it is silent.
    """

    def __init__(self, launch: Launch, *, folder: Path, ready_s: float = READY_S) -> None:
        """Starts loading and returns; `wait_ready` waits for it."""
        self.name = launch.name
        self.max_batch_size = launch.max_batch_size
        self.version = ""
        self._log = folder / f"{launch.name.replace(' ', '-')}.log"
        self._ready_s = ready_s
        command = [str(launch.python), str(LINES), str(launch.engine), json.dumps(dict(launch.settings))]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, process_group=0,
                env={**launch.environment, "HF_HUB_OFFLINE": "1", **os.environ},
            )  # fmt: skip

    def wait_ready(self) -> None:
        """Return when the engine is loaded, and put it to sleep."""
        self.version = self._read(self._ready_s)["version"]
        self._signal(signal.SIGSTOP)

    def answer(self, prompts: Sequence[list[int]], num_tokens: int) -> Turn:
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # reading will say why
            self._process.stdin.write(json.dumps({"prompts": list(prompts), "num_tokens": num_tokens}) + "\n")
            self._process.stdin.flush()
        said = self._read(ANSWER_S)
        self._signal(signal.SIGSTOP)
        return Turn(token_ids=tuple(map(tuple, said["token_ids"])), wall_s=said["wall_s"], num_steps=said["num_steps"])

    def close(self) -> None:
        """End the whole group: by the end of its input, else by force."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_S)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _read(self, timeout_s: float) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], timeout_s)[0]:
            raise TimeoutError(f"{self.name} said nothing for {timeout_s:g} s; {self._log_end()}")
        line = stdout.readline()
        if not line:
            raise ChildProcessError(f"{self.name} ended with exit code {self._process.wait()}; {self._log_end()}")
        message: dict[str, Any] = json.loads(line)
        return message

    def _log_end(self) -> str:
        last = self._log.read_text(errors="replace").strip().splitlines()[-5:]
        return f"its log ends: {' | '.join(last) or '(empty)'}"


@contextmanager
def started(launches: Sequence[Launch], *, folder: Path) -> Iterator[list[Peer]]:
    """The engines, loaded one after the other and asleep, ended with the block."""
    with ExitStack() as stack:
        peers = []
        for launch in launches:
            console.print(f"loading {launch.name}", highlight=False)
            peers.append(Peer(launch, folder=folder))
            stack.callback(peers[-1].close)
            peers[-1].wait_ready()
        yield peers
