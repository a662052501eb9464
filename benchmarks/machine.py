"""What a number was measured on. Reads the machine, the package versions and the clock; knows no model."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

# What decides how fast a small model runs on a CPU, in the words of lscpu.
TELLING_FLAGS = {
    "x86_64": ("avx2", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16"),
    "aarch64": ("asimd", "bf16", "i8mm", "sve"),
}
PACKAGES = ("torch", "transformers", "medusa-ray")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where, when and with what a measurement was made."""

    command: str
    date: str
    revision: str
    cpu: str
    num_cores: int
    num_threads: int
    cpu_flags: tuple[str, ...]
    missing_flags: tuple[str, ...]
    load_average: float
    gpu: str | None
    python: str
    versions: dict[str, str]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(module: str) -> Machine:
    """`module` is what stood behind `python -m`. The load is read now: call this before the work starts."""
    model, flags = _read_cpu()
    telling = TELLING_FLAGS.get(platform.machine(), ())
    return Machine(
        command=shlex.join(["python", "-m", module, *map(_without_folder, sys.argv[1:])]),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        revision=_revision(),
        cpu=model,
        num_cores=num_cores(),
        num_threads=torch.get_num_threads(),
        cpu_flags=tuple(flag for flag in telling if flag in flags),
        missing_flags=tuple(flag for flag in telling if flag not in flags),
        load_average=round(os.getloadavg()[0], 2),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        python=platform.python_version(),
        versions={name: version(name) for name in PACKAGES if _installed(name)},
    )


def _without_folder(argument: str) -> str:
    """Results are published: an absolute path keeps its name alone."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _read_cpu() -> tuple[str, set[str]]:
    """Model name and flags, from `lscpu` where there is one."""
    try:
        # The C locale: lscpu translates its labels.
        text = subprocess.run(
            ["lscpu"], capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"}
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return platform.processor() or platform.machine(), set()
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    family = ", ".join(f"{key.lower()} {fields[key].strip()}" for key in ("CPU family", "Model") if key in fields)
    name = fields.get("Model name", platform.machine()).strip()
    return f"{name} ({family})" if family else name, set(fields.get("Flags", "").split())


def _revision() -> str:
    """Short git revision, `+` where the tree has changes; empty outside a repository."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    outcome = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return outcome.stdout.strip()


def _installed(name: str) -> bool:
    try:
        version(name)
    except ImportError:
        return False
    return True
