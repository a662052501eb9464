"""What a measurement's key tells apart."""

from __future__ import annotations

import hashlib
import json

import pytest

from pipelines import inputs
from pipelines.inputs import inputs_key


def test_a_key_is_of_its_parts_and_of_how_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    key = inputs_key("weights", {"b": 1, "a": 2})
    assert key == inputs_key("weights", {"a": 2, "b": 1})
    assert key != inputs_key("weights", {"a": 2, "b": 2})
    parts = json.dumps(["weights", {"a": 2, "b": 1}])
    assert key != hashlib.sha256(parts.encode()).hexdigest()[:16]  # of releases that rounded rotary frequencies
    monkeypatch.setattr(inputs, "VERSION", inputs.VERSION + 1)
    assert key != inputs_key("weights", {"b": 1, "a": 2})
