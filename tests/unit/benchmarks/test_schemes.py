"""Steps of every scheme are timed, ours and PyTorch's, and nothing stays switched off."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import medusa
from benchmarks import schemes
from medusa import acceptance
from medusa.checkpoint import save_checkpoint
from tests.unit.medusa.tiny import random_heads


def test_every_scheme_is_timed_both_ways(tiny_folder: Path, tmp_path: Path) -> None:
    backbone = medusa.load(tiny_folder, heads=None, dtype="float32").backbone
    save_checkpoint(
        tmp_path / "heads", random_heads(backbone), paths=[(0,), (0, 0), (1,)], backbone_name=backbone.name,
        backbone_fingerprint=backbone.fingerprint,
    )  # fmt: skip
    out, kernel = tmp_path / "results", acceptance.can_walk
    schemes.main(
        backbone=str(tiny_folder), heads=str(tmp_path / "heads"), dtype="float32", device="cpu",
        threads=torch.get_num_threads(), tree=3, batch=[2], length=20, rounds=2, output=out,
    )  # fmt: skip
    (page,), (record,) = out.glob("*.md"), out.glob("*.json")
    figures = json.loads(record.read_text())["figures"]
    assert set(figures) == {"2 sequences, plain", "2 sequences, 3 nodes"}
    for seconds in figures.values():
        assert set(seconds) == {name + way for name in schemes.HOW for way in ("", ", by PyTorch")}
        assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())
    assert acceptance.can_walk is kernel and "typical, top-p 0.9, by PyTorch" in page.read_text()
