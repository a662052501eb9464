"""The measuring commands on a tiny model: every contender says the same, and the files tell what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import medusa
from benchmarks import acceptance, bench, command, distillation, replay, training
from medusa.checkpoint import load_checkpoint, save_checkpoint
from medusa.config import HeadsConfig
from medusa.heads import MedusaHeads

NUM_TOKENS = 12


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The commands set torch's threads, as a program may; a test gives them back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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


def test_bench_compares_like_with_like(tiny_folder: Path, heads_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    bench.main(
        backbone=str(tiny_folder), heads=str(heads_folder), dtype="float32", device="cpu", threads=1,
        max_tokens=NUM_TOKENS, tree=["2", "5"], repeats=2, limit=2, output=out,
    )  # fmt: skip
    (page,), (record,) = out.glob("*.md"), out.glob("*.json")
    figures = json.loads(record.read_text())["figures"]
    assert set(figures["trees"]) == {"tree of 2", "tree of 5"}
    assert figures["plain_agrees_with_generate"] == {"num_identical": 2, "num_prompts": 2, "first_difference": None}
    for tree in figures["trees"].values():
        assert tree["agrees_with_plain"]["num_identical"] == 2
        assert 1 <= tree["acceleration_rate"] <= 3
        assert 0 < tree["overhead"]["min"] <= tree["overhead"]["median"] <= tree["overhead"]["max"]
    assert "python -m benchmarks.bench" in page.read_text()


def test_without_sizes_the_models_own_tree_is_measured(tiny_folder: Path, heads_folder: Path, tmp_path: Path) -> None:
    acceptance.main(
        backbone=str(tiny_folder), heads=str(heads_folder), dtype="float32", device="cpu", threads=1,
        max_tokens=NUM_TOKENS, output=tmp_path,
    )  # fmt: skip
    (record,) = tmp_path.glob("acceptance-*.json")
    ((name, by_category),) = json.loads(record.read_text())["figures"]["acceleration_rate"].items()
    assert name == "tree of 3"
    assert set(by_category) == {*(prompt.category for prompt in bench.built_in()), "all"}
    assert min(by_category.values()) <= by_category["all"] <= max(by_category.values())


def test_dynamic_trees_stand_beside_static_ones(tiny_folder: Path, heads_folder: Path, tmp_path: Path) -> None:
    acceptance.main(
        backbone=str(tiny_folder), heads=str(heads_folder), dtype="float32", device="cpu", threads=1, limit=2,
        max_tokens=NUM_TOKENS, tree=["5", "dynamic:5", "dynamic:3"], output=tmp_path,
    )  # fmt: skip
    (record,) = tmp_path.glob("acceptance-*.json")
    rates = json.loads(record.read_text())["figures"]["acceleration_rate"]
    assert list(rates) == ["tree of 5", "dynamic tree of 5", "dynamic tree of 3"]
    assert rates["dynamic tree of 5"] == rates["tree of 5"], "its superset has no more nodes"


def test_replay_counts_what_the_engine_counts_and_keeps_the_tree_it_grew(
    tiny_folder: Path, heads_folder: Path, tmp_path: Path
) -> None:
    common = dict(backbone=str(tiny_folder), dtype="float32", device="cpu", threads=1, max_tokens=NUM_TOKENS, limit=4)
    others = tmp_path / "others.jsonl"
    others.write_text("\n".join(json.dumps({"prompt": f"Say {n}"}) for n in range(3)))
    acceptance.main(heads=str(heads_folder), output=tmp_path, **common)  # type: ignore[arg-type]
    kept = tmp_path / "kept"
    replay.main(
        heads=[str(heads_folder)], tree=[3, 5], calibration=others, batch=3, kept=kept,
        output=tmp_path, **common,  # type: ignore[arg-type]
    )  # fmt: skip
    (decoded,), (counted,) = tmp_path.glob("acceptance-*.json"), tmp_path.glob("replay-*.json")
    rates = json.loads(counted.read_text())["figures"]["rates"]
    assert set(rates) == {f"heads, {how}, {size}" for how in (replay.STORED, replay.GROWN) for size in (3, 5)}
    engine = json.loads(decoded.read_text())["figures"]["acceleration_rate"]["tree of 3"]
    assert rates[f"heads, {replay.STORED}, 3"] == pytest.approx(engine)
    before, after = load_checkpoint(heads_folder), load_checkpoint(kept)
    assert after.paths != before.paths
    pairs = zip(before.heads.parameters(), after.heads.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    with pytest.raises(ValueError, match="--calibration"):
        replay.main(kept=kept)


def test_distillation_writes_every_row_to_its_length_at_every_batch_size(
    tiny_folder: Path, heads_folder: Path, tmp_path: Path
) -> None:
    distillation.main(
        backbone=str(tiny_folder), heads=str(heads_folder), dtype="float32", device="cpu", threads=1,
        batch=[2, 3], tree=[1, 3], follow_load=True, max_tokens=NUM_TOKENS, rows=5, repeats=2, output=tmp_path,
    )  # fmt: skip
    (record,) = tmp_path.glob("distillation-*.json")
    figures = json.loads(record.read_text())["figures"]
    assert figures.keys() == {f"{name}, batch {size}" for name in ("plain", "tree of 3", "adaptive") for size in (2, 3)}
    assert all(len(speeds) == 2 and min(speeds) > 0 for speeds in figures.values())

    model = medusa.load(tiny_folder, heads=heads_folder, dtype="float32")
    rows = [[5, 6, 7], [8] * 9, [9]]
    for nodes in (1, 3):
        pass_ = distillation.run_once(model, distillation.Contender(batch=2, nodes=nodes), rows, num_tokens=NUM_TOKENS)
        assert pass_.num_tokens == 3 * NUM_TOKENS
        assert pass_.num_steps <= 3 * (NUM_TOKENS - 1)
        assert (pass_.num_steps == 3 * (NUM_TOKENS - 1)) or nodes > 1


def test_a_tree_that_the_heads_cannot_fill_is_refused(tiny_folder: Path, heads_folder: Path) -> None:
    model = medusa.load(tiny_folder, heads=heads_folder, dtype="float32")
    with pytest.raises(ValueError, match="1 to 5 nodes"):
        command.choose_trees(model, [6])


def test_errors_take_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ValueError("tree [0] is too small")

    monkeypatch.setattr("sys.argv", ["bench"])
    with pytest.raises(SystemExit) as exit_info:
        command.run_command(fail)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.strip() == "error: tree [0] is too small"


def test_the_loss_in_chunks_is_measured_beside_the_plain_one(tmp_path: Path) -> None:
    """Enough logits that the plain formula's memory stands out: 256 x 3 x 20,000 floats are 59 MiB."""
    training.main(
        positions=[256], num_heads=3, hidden_size=8, vocab_size=20_000, chunk=16, threads=1, repeats=1, output=tmp_path
    )
    (record,) = tmp_path.glob("training-*.json")
    figures = json.loads(record.read_text())["figures"]
    naive, chunked = figures["naive 256"], figures["chunked 256"]
    assert naive["loss"] == pytest.approx(chunked["loss"], rel=1e-4)
    assert naive["peak_mib"] > 50
    assert chunked["peak_mib"] < naive["peak_mib"] / 3
    assert min(naive["positions_per_s"], chunked["positions_per_s"]) > 0
