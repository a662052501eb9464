"""From kernels.c and its headers to a loaded library, once for each machine. Knows the C compiler and the cache folder; knows no
tensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from medusa.provision import default_cache_dir

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
LIMIT_S = 120


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had: no C compiler, or one without what they need.

    Compiling takes seconds, once for each machine, compiler and version of the source: the cache folder keeps it.
    `MEDUSA_NATIVE=0` does without.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None or os.environ.get("MEDUSA_NATIVE") == "0":
        return None
    try:
        _share_thread_pool()
        loaded = _load(compiler, default_cache_dir() / "native" / f"kernels-{_key(compiler)}.so")
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        logger.warning("the CPU kernels cannot be compiled, so decoding is slower: %s", reason.strip()[:500])
        return None
    for name in ("lanes", "tiles", "work_bytes", "linear_bytes", "guess_bytes", "search_bytes", "accept_bytes"):
        getattr(loaded, f"medusa_{name}").restype = ctypes.c_int64
    return loaded


def _load(compiler: str, path: Path) -> ctypes.CDLL:
    """The library at `path`, compiled if it is not there; for this process alone where it cannot be kept there."""
    with contextlib.suppress(OSError):  # a folder that may not be searched, a file that does not load
        if path.exists():
            return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory() as mine:
        made = Path(mine) / path.name
        _compile(compiler, made)
        try:
            _keep(made, path)
        except OSError:  # closed to this user, read-only, full
            return ctypes.CDLL(str(made))
    return ctypes.CDLL(str(path))


def _key(compiler: str) -> str:
    """What the library depends on: source, flags, compiler, processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=LIMIT_S).stdout
    digest = hashlib.sha256(version + " ".join(FLAGS).encode())
    for source in sorted(SOURCE.parent.glob("*.[ch]")):
        digest.update(source.read_bytes())
    digest.update(_processor().encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """Name and features: a cache folder may be shared by machines of several kinds."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    told = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return platform.machine() + "".join(told)


def _compile(compiler: str, path: Path) -> None:
    command = [compiler, *FLAGS, str(SOURCE), "-o", str(path), "-lm"]
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT_S)


def _keep(made: Path, path: Path) -> None:
    """The library appears at `path` whole or not at all; two processes may make it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".kernels-") as work:
        os.replace(shutil.copy(made, work), path)


def _share_thread_pool() -> None:
    """Let the kernels find PyTorch's own OpenMP runtime: a second one would keep threads of its own on the same cores."""
    for runtime in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
