"""Step times of several sets of heads, measured in turns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import medusa
from benchmarks import steps
from medusa.checkpoint import save_checkpoint
from medusa.config import HeadKind, HeadsConfig
from medusa.heads import MedusaHeads

KINDS: tuple[HeadKind, ...] = ("medusa", "hydra")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The command sets torch's threads, as a program may; a test gives them back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_steps_of_each_set_of_heads_and_size_are_timed_in_turns(tiny_folder: Path, tmp_path: Path) -> None:
    backbone = medusa.load(tiny_folder, heads=None, dtype="float32").backbone
    for kind in KINDS:
        shape = HeadsConfig(num_heads=2, kind=kind)
        heads = MedusaHeads(shape, hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size)
        save_checkpoint(
            tmp_path / kind, heads, paths=[(0,), (0, 0), (1,)], backbone_name=backbone.name,
            backbone_fingerprint=backbone.fingerprint,
        )  # fmt: skip
    out = tmp_path / "results"
    steps.main(
        heads=[str(tmp_path / kind) for kind in KINDS], tree=["4", "2", "dynamic:3"], backbone=str(tiny_folder), dtype="float32",
        device="cpu", threads=1, batch=2, length=40, rounds=2, output=out,
    )  # fmt: skip
    (page,), (record,) = out.glob("*.md"), out.glob("*.json")
    seconds = json.loads(record.read_text())["figures"]["seconds"]
    assert set(seconds) == {f"{kind}, {tree}" for kind in KINDS for tree in ("1", "2", "4", "dynamic:3")}
    assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())
    assert "hydra, dynamic:3" in page.read_text()
