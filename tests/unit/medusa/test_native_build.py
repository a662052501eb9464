"""The CPU kernels are compiled once for a machine, and everything works without them."""

from __future__ import annotations

import errno
import logging
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from medusa.linear import Kernel, kernel_for
from medusa.native import build

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(build.library() is None, reason="no C compiler here")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, nothing loaded."""
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path
    build.library.cache_clear()


@needs_kernels
def test_the_library_is_compiled_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.library() is not None
    [made] = fresh.glob("native/*")
    assert made.suffix == ".so"
    build.library.cache_clear()
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build.library() is not None


@needs_kernels
def test_a_change_of_any_source_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("cc") or "gcc"
    shutil.copytree(build.SOURCE.parent, tmp_path / "native")
    monkeypatch.setattr(build, "SOURCE", tmp_path / "native" / build.SOURCE.name)
    keys = {build._key(compiler)}
    sources = [*(tmp_path / "native").glob("*.[ch]")]
    for source in sources:
        source.write_text(source.read_text() + "/* changed */\n")
        keys.add(build._key(compiler))
    assert len(keys) == 1 + len(sources) > 2


@needs_kernels
@pytest.mark.parametrize("error", [PermissionError("closed"), OSError(errno.EROFS, "read-only file system")])
def test_a_cache_folder_that_cannot_be_written_costs_only_time(
    fresh: Path, error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Path, "mkdir", closed)
    assert build.library() is not None
    assert not list(fresh.iterdir())


@needs_kernels
def test_neither_a_full_cache_nor_one_that_may_not_be_searched_keeps_the_kernels_away(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, exists = subprocess.run, Path.exists

    def on_full_disk(command: list[str], **options: Any) -> Any:
        if any(part.startswith(str(fresh)) for part in command):
            raise subprocess.CalledProcessError(1, command, stderr="No space left on device")
        return run(command, **options)

    def refused(path: Path, *_: object, **__: object) -> Any:
        if path.is_relative_to(fresh):
            raise PermissionError("closed")
        return exists(path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(subprocess, "run", on_full_disk)
    monkeypatch.setattr(Path, "exists", refused)
    monkeypatch.setattr(shutil, "copy", full)
    assert build.library() is not None
    assert not list(fresh.glob("native/*"))


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("compiler", ["", "#!/bin/sh\necho 'no such option' >&2\n[ $1 = --version ]\n"])
def test_without_a_working_compiler_another_kernel_is_taken(
    compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if compiler:
        (tmp_path / "cc").write_text(compiler)
        (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if compiler else str(tmp_path))
    monkeypatch.setenv("CC", "cc" if compiler else "nothing-there")
    with caplog.at_level(logging.WARNING):
        assert build.library() is None
    assert ("no such option" in caplog.text) == bool(compiler)
    assert kernel_for(torch.bfloat16, CPU) is not Kernel.NATIVE
    assert not list(tmp_path.glob("native/*.so"))


@pytest.mark.usefixtures("fresh")
def test_the_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDUSA_NATIVE", "0")
    assert build.library() is None
