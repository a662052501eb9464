"""`medusa export` and `medusa import` in-process: heads go out and come back, and what cannot is one line, exit code 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import medusa
from deploy.cli import app
from medusa.adapters import Adapters
from medusa.checkpoint import load_checkpoint, save_checkpoint
from tests.unit.medusa.tiny import random_heads


def call(*args: Any) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def saved(folder: Path, tiny_folder: Path, adapters: Adapters | None = None) -> Path:
    backbone = medusa.load(tiny_folder, heads=None, dtype="float32").backbone
    return save_checkpoint(
        folder / "heads", random_heads(backbone), paths=[(0,), (1,), (0, 0)], backbone_name=backbone.name,
        backbone_fingerprint=backbone.fingerprint, adapters=adapters, dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["vllm", "reference", "reference-pt"])
def test_heads_go_out_and_come_back(tmp_path: Path, tiny_folder: Path, layout: str) -> None:
    heads = saved(tmp_path, tiny_folder)
    given = ["--backbone", tiny_folder, "--heads", heads, "--dtype", "float32"]
    out = call("export", tmp_path / "out", "--format", layout, *given)
    assert out.exit_code == 0, out.output
    assert out.stdout.startswith(f"{tmp_path / 'out'}: {layout}")
    back = call("import", tmp_path / "out", tmp_path / "back", "--backbone", tiny_folder)
    assert back.exit_code == 0, back.output
    assert "3 heads of 1 layer(s), shared lm_head" in back.stdout
    want, got = load_checkpoint(heads).heads, load_checkpoint(tmp_path / "back").heads
    assert all(torch.equal(got.get_parameter(name), weight) for name, weight in want.named_parameters())


def test_tuned_heads_take_their_backbone_along(tmp_path: Path, tiny_folder: Path) -> None:
    backbone = medusa.load(tiny_folder, heads=None, dtype="float32").backbone
    name = "model.layers.1.mlp.up_proj.weight"
    changed = dict(backbone.model.named_parameters())[name].detach() * 1.5
    heads = saved(tmp_path, tiny_folder, Adapters(kind="full", tensors={name: changed}))
    given = ["--backbone", tiny_folder, "--heads", heads, "--dtype", "float32"]
    refused = call("export", tmp_path / "out", "--format", "vllm", *given)
    assert refused.exit_code == 2
    assert "--backbone-to" in refused.stderr
    out = call("export", tmp_path / "out", "--format", "vllm", "--backbone-to", tmp_path / "tuned", *given)
    assert out.exit_code == 0, out.output
    tuned = medusa.load(tmp_path / "tuned", heads=None, dtype="float32").backbone
    assert torch.equal(dict(tuned.model.named_parameters())[name], changed)

    whole = call("export", tmp_path / "whole", "--format", "reference", *given)
    assert whole.stdout.endswith("reference-full\n"), whole.output
    assert call("import", tmp_path / "whole", tmp_path / "back").exit_code == 0, "it is its own backbone"
    assert load_checkpoint(tmp_path / "back", backbone=tuned).adapters is None


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["export", "new", "--format", "gguf"], "unknown format 'gguf'"),
        (["export", ".", "--format", "vllm"], "exists; give a new folder"),
        (["export", "new"], "--format"),
        (["import", "nowhere", "new", "--backbone", "TINY"], "no file or folder at nowhere"),
        (["import", "alone.pt", "new"], "alone.pt holds no backbone; say what its heads were trained on (--backbone)"),
        (["import", "heads", "."], "exists; give a new folder"),
        (["import", "heads", "new", "--backbone", "TINY"], "no Medusa heads of a known layout"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "config.json").write_text(json.dumps({"medusa_num_heads": 4}))
    result = call(*(tiny_folder if arg == "TINY" else arg for arg in args))
    assert result.exit_code == 2, result.output
    assert word in result.stderr.splitlines()[-1], result.stderr
    assert not (tmp_path / "new").exists()
