"""What a measurement's key tells apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from pipelines import inputs
from pipelines.inputs import inputs_key, weights_digest
from pipelines.registry import folder_digest


def test_a_key_is_of_its_parts_and_of_how_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    key = inputs_key("weights", {"b": 1, "a": 2})
    assert key == inputs_key("weights", {"a": 2, "b": 1})
    assert key != inputs_key("weights", {"a": 2, "b": 2})
    parts = json.dumps(["weights", {"a": 2, "b": 1}])
    assert key != hashlib.sha256(parts.encode()).hexdigest()[:16]  # of releases that rounded rotary frequencies
    monkeypatch.setattr(inputs, "VERSION", inputs.VERSION + 1)
    assert key != inputs_key("weights", {"b": 1, "a": 2})


def test_digests_are_those_that_versions_and_records_bear(tmp_path: Path) -> None:
    """What is tagged in registries must be found again by every later release."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_bytes(b"text")
    (tmp_path / "b.safetensors").write_bytes(b"heads")
    heads = b"b.safetensors\x005\x00heads"
    assert weights_digest(tmp_path) == hashlib.sha256(heads).hexdigest()
    assert folder_digest(tmp_path) == hashlib.sha256(heads + b"sub/a.txt\x004\x00text").hexdigest()[:16]
