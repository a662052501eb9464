"""The scripts for a GPU run on a CPU at tiny shapes, and the arithmetic between times and figures is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import medusa
from benchmarks.gpu import speed_default, step_cost
from benchmarks.gpu.shapes import SHAPES, random_backbone, random_heads, read_bytes, typical_tree
from medusa import attention
from medusa.attention import parse_gpu_kernels
from medusa.checkpoint import save_checkpoint
from tests.gpu.test_graphs import engine_answers
from tests.unit.medusa.tiny import NUM_HEADS
from tests.unit.medusa.tiny import random_heads as tiny_heads

CPU = torch.device("cpu")


def run(command: Callable[..., None], output: Path, *options: str) -> tuple[dict, str]:
    app = typer.Typer()
    app.command()(command)
    outcome = CliRunner().invoke(app, [*options, "--device", "cpu", "--dtype", "float32", "--output", str(output)])
    assert outcome.exit_code == 0, outcome.output
    (record,), (page,) = output.glob("*.json"), output.glob("*.md")
    return json.loads(record.read_text()), page.read_text()


def test_steps_are_timed_for_every_size_at_tiny_shapes(tmp_path: Path) -> None:
    sizes = ["--batch", "1", "--batch", "2", "--nodes", "4", "--context", "30", "--repeats", "1", "--copy-mib", "1"]
    record, page = run(step_cost.main, tmp_path, "--shapes", "tiny", *sizes)
    figures = record["figures"]
    assert set(figures) == {"shared lm_heads, torch kernels", "own lm_heads, torch kernels"}
    for own in figures.values():
        assert {batch: set(row) for batch, row in own["seconds"].items()} == {"1": {"1", "4"}, "2": {"1", "4"}}
        assert all(value > 0 for row in own["seconds"].values() for value in row.values())
    assert record["settings"]["graphs"] is False and "largest tree / plain step" in page


def test_a_plain_step_reads_the_weights_but_the_embedding_and_the_whole_cache() -> None:
    backbone, s = random_backbone("tiny", device=CPU, dtype=torch.float32), SHAPES["tiny"]
    d, kv = s["hidden_size"], s["hidden_size"] // s["num_attention_heads"] * s["num_key_value_heads"]
    layer = 2 * d * d + 2 * d * kv + 3 * d * s["intermediate_size"] + 2 * d
    weights = s["num_hidden_layers"] * layer + d + s["vocab_size"] * d
    cache = 2 * s["num_hidden_layers"] * kv * 3 * 100
    assert read_bytes(backbone, rows=3, context=100) == 4 * (weights + cache)
    assert random_heads(backbone, "own").num_heads == typical_tree(64).depth == 5 and typical_tree(64).num_nodes == 64


def test_overhead_is_the_largest_trees_step_over_the_plain_one() -> None:
    one = step_cost.Measured(lm_heads="own", kernel="torch", seconds={1: {1: 2.0, 8: 2.2, 64: 2.5}})
    assert one.overhead(1) == 1.25


def test_a_tree_is_set_beside_plain_decoding(tiny_folder: Path, tmp_path: Path) -> None:
    backbone = medusa.load(tiny_folder, heads=None, dtype="float32").backbone
    heads = save_checkpoint(
        tmp_path / "heads", tiny_heads(backbone), paths=[(0,), (1,), (0, 0)], backbone_name=backbone.name,
        backbone_fingerprint=backbone.fingerprint, default_nodes=4, accuracy=[[0.5, 0.2]] * NUM_HEADS,
    )  # fmt: skip
    few = ["--max-tokens", "6", "--repeats", "1", "--policy-s", "0"]
    options = ["--backbone", str(tiny_folder), "--heads", str(heads), "--batch", "1", "--batch", "2", "--limit", "2"]
    trees = ["--tree", "4", "--tree", "dynamic:3"]
    record, page = run(speed_default.main, tmp_path / "out", *options, *trees, *few)
    assert set(record["figures"]) == {"1", "2"}
    for own in record["figures"].values():
        assert set(own) == {"plain", "tree of 4", "dynamic tree of 3", "adaptive"}
        assert own["plain"]["against_plain"]["median"] == own["plain"]["steps_against_plain"]["median"] == 1
        for tree in own.values():
            assert tree["num_identical"] == tree["num_answers"] > 1 and tree["acceleration_rate"] >= 1
    assert "2 sequences" in page


def test_what_cannot_be_had_here_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown shapes 'llama'; choose one of vicuna-7b, smollm2-135m, tiny"):
        random_backbone("llama", device=CPU, dtype=torch.float32)
    with pytest.raises(ValueError, match="needs a CUDA GPU, got device cpu; use 'torch'"):
        parse_gpu_kernels("triton", CPU)
    with pytest.raises(ValueError, match="unknown gpu_kernels 'flash'; choose one of torch, triton, fused"):
        parse_gpu_kernels("flash", CPU)


def test_a_kernel_is_chosen_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_triton", lambda: True)
    gpu = torch.device("cuda")
    assert parse_gpu_kernels(None, gpu) == parse_gpu_kernels(None, gpu, torch.bfloat16) == "triton"
    assert parse_gpu_kernels(None, gpu, torch.float64) == parse_gpu_kernels(None, CPU) == "torch"
    monkeypatch.setattr(attention, "has_triton", lambda: False)
    assert parse_gpu_kernels(None, gpu) == "torch"


def test_the_helper_of_the_gpu_tests_works_without_a_gpu() -> None:
    answers = engine_answers("cpu", tree="dynamic", scheme="typical top-k")
    assert [len(answer) for answer in answers] == [24] * 5
    assert engine_answers("cpu", scheme="limited") == engine_answers("cpu", tree="dynamic")


def test_answers_without_a_step_are_told(tiny_folder: Path) -> None:
    model = medusa.load(tiny_folder, heads=None, dtype="float32")
    made = speed_default.engines(model, [], batch=1, context_length=32, policy_s=0, graphs=False)
    with pytest.raises(ValueError, match="every answer ended with its first token"):
        speed_default.answer_all(made["plain"], [[3, 1]], max_tokens=1)
