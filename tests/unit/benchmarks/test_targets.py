"""Targets beside what was measured, and the roofline's arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import medusa
from benchmarks.comparison import Comparison, Spread
from benchmarks.roofline import Roofline, cache_bytes, read_bandwidth, weight_bytes
from benchmarks.targets import NOT_MEASURED, TARGETS, target_grid
from medusa.kv_cache import KVCache
from medusa.native.build import library
from tests.tiny_models import save_tiny_folder


def comparison(speedups: dict[str, dict[str, float]]) -> Comparison:
    return Comparison(
        tokens_per_s={},
        speedups={
            ours: {other: Spread(min=value - 0.1, median=value, max=value + 0.1) for other, value in others.items()}
            for ours, others in speedups.items()
        },
        overheads={},
        acceleration_rates={},
        agreements={},
        plain_step_s=1.0,
    )


def test_each_target_says_whether_it_holds_and_what_was_not_there_says_so() -> None:
    grid = target_grid(
        {
            1: comparison(
                {
                    "plain": {"generate": 2.5, "vLLM": 0.99},
                    "tree of 6": {"vLLM": 1.8, "plain": 0.97},
                    "int8 tree of 6": {"llama.cpp": 1.3},
                }
            ),
            16: comparison({"plain": {"vLLM": 1.1}, "tree of 6": {"plain": 0.96}}),
        },
        tree="tree of 6",
    )
    verdicts = {(row[0], row[1]): (row[4], row[-1]) for row in grid.rows}
    assert verdicts["plain / generate", "1"] == ("2.50", "yes, and the aim")
    assert verdicts["plain / vLLM", "1"] == ("0.99", "no")
    assert verdicts["tree of 6 / vLLM", "1"] == ("1.80", "yes")
    assert verdicts["tree of 6 / plain", "1"] == ("0.97", "yes")
    assert verdicts["int8 tree of 6 / llama.cpp", "1"] == ("1.30", "yes, and the aim")
    assert verdicts["plain / vLLM", "16"] == ("1.10", "yes")
    assert verdicts["tree of 6 / plain", "16"] == ("0.96", "no")
    for name, batch in [("tree of 6 / llama.cpp", "1"), ("plain / vLLM", "4"), ("tree of 6 / plain", "32")]:
        assert verdicts[name, batch] == (NOT_MEASURED, "")
    assert len(grid.rows) == sum(len(target.batches) for target in TARGETS) == len(verdicts)


def test_the_share_is_the_time_to_read_everything_once_over_the_step() -> None:
    one = Roofline(weight_bytes=900, cache_bytes=100, bandwidth=10_000.0, step_s=0.4)
    assert (one.limit_s, one.share) == (0.1, 0.25)


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_counts_once_and_an_embedding_only_as_lm_head(tied: bool, tmp_path: Path) -> None:
    folder = save_tiny_folder(tmp_path, tie_word_embeddings=tied)
    backbone = medusa.load(folder, heads=None, dtype="float32").backbone
    table = backbone.model.get_input_embeddings().weight.nbytes
    named = sum(p.nbytes for _, p in backbone.model.named_parameters())  # a tied weight is named once
    assert weight_bytes(backbone) == named - (0 if tied else table)


@pytest.mark.skipif(library() is None, reason="no C compiler here")
def test_a_rounded_matrix_is_a_byte_a_weight(tiny_folder: Path) -> None:
    backbone = medusa.load(tiny_folder, heads=None, dtype="int8").backbone
    counts = {name: p.numel() for name, p in backbone.model.named_parameters() if "embed" not in name}
    norms = sum(count for name, count in counts.items() if "norm" in name)
    assert weight_bytes(backbone) == sum(counts.values()) + norms  # norms stay bfloat16


def test_a_position_holds_keys_and_values_of_every_layer() -> None:
    cache = KVCache(
        num_layers=3, num_slots=2, capacity=64, num_kv_heads=4, head_dim=8, dtype=torch.bfloat16, device=torch.device("cpu")
    )  # fmt: skip
    assert cache_bytes(cache, length=10) == 10 * 3 * 2 * 4 * 8 * 2


def test_bandwidth_is_bytes_over_the_best_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 10.0, 10.5, 20.0, 21.0, 30.0, 33.0, 40.0, 44.0])
    monkeypatch.setattr("benchmarks.roofline.READ_BYTES", 4000)
    monkeypatch.setattr("benchmarks.roofline.time.perf_counter", lambda: next(clock))
    assert read_bandwidth(torch.device("cpu")) == 4000 / 0.5
