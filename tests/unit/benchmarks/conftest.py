"""Heads that the measuring commands can load."""

from __future__ import annotations

from pathlib import Path

import pytest

import medusa
from medusa.checkpoint import save_checkpoint
from medusa.config import HeadsConfig
from medusa.heads import MedusaHeads


@pytest.fixture
def heads_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    backbone = medusa.load(tiny_folder, heads=None, dtype="float32").backbone
    heads = MedusaHeads(HeadsConfig(num_heads=2), hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size)
    return save_checkpoint(
        tmp_path / "heads",
        heads,
        paths=[(0,), (1,), (0, 0), (2,)],
        backbone_name=backbone.name,
        backbone_fingerprint=backbone.fingerprint,
        default_nodes=3,
        accuracy=[[0.4, 0.2, 0.1], [0.3, 0.1, 0.1]],
    )
