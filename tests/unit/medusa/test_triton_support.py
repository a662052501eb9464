"""Triton is used where it can be imported and can compile; elsewhere slower code serves, and says why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from medusa import triton_support
from medusa.triton_support import has_triton


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    has_triton.cache_clear()
    monkeypatch.delenv("CC", raising=False)
    yield
    has_triton.cache_clear()


def imports(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    def load(name: str) -> Any:
        if error is not None:
            raise error

    monkeypatch.setattr(triton_support.importlib, "import_module", load)


def compilers(monkeypatch: pytest.MonkeyPatch, *found: str) -> None:
    monkeypatch.setattr(triton_support.shutil, "which", lambda name: f"/bin/{name}" if name in found else None)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_with_a_compiler_it_is_used(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    imports(monkeypatch, None)
    compilers(monkeypatch, compiler)
    assert has_triton()


def test_a_compiler_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    imports(monkeypatch, None)
    compilers(monkeypatch)
    monkeypatch.setenv("CC", "/opt/cc")
    assert has_triton()


def test_without_a_compiler_it_is_not_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    imports(monkeypatch, None)
    compilers(monkeypatch)
    assert not has_triton() and "install gcc or set CC" in caplog.text


def test_a_broken_install_says_so_and_a_missing_one_does_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compilers(monkeypatch, "gcc")
    imports(monkeypatch, ModuleNotFoundError("No module named 'triton'"))
    assert not has_triton() and not caplog.text
    has_triton.cache_clear()
    imports(monkeypatch, OSError("libcuda.so: wrong ELF class"))
    assert not has_triton() and "libcuda.so: wrong ELF class" in caplog.text
