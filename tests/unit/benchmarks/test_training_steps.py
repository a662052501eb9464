"""Training steps beside plain loops: ours and naive ones learn the same from the same rows, and the pages tell of both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from multiprocessing import Pipe
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import training_steps
from benchmarks.peak_memory import MIB, peak_bytes, reset_peak
from benchmarks.training_contenders import CONTENDERS, FIRST, LATER, NAIVE, OURS, Batch, Setting, Trainer, keep, padded
from benchmarks.training_processes import TOLERANCE, Job, OwnProcess, _check_same, serve
from benchmarks.training_rows import draw_batches, num_labels, padding_share, random_rows, read_rows
from medusa.backbone import Backbone
from medusa.config import HeadsConfig
from medusa.losses import IGNORE, head_targets
from pipelines.config import TrainSection
from pipelines.dataset import labels_of
from pipelines.records import Answer
from tests.unit.medusa.tiny import tiny_backbone

ROWS = [
    Answer(
        id=str(n), prompt_id=str(n), prompt_ids=[n % 11 + 1] * (1 + n % 3),
        response_ids=[(n * 7 + i * 3) % 12 for i in range(3 + 2 * n)],
    )
    for n in range(6)
]  # fmt: skip
BATCHES = (ROWS[::2], ROWS[1::2])
STEPS = (0, 1, 0)
PAIRS = [(method, name) for method, names in CONTENDERS.items() for name in names if name != NAIVE]


def setting(folder: Path, method: str, batches: Sequence[Batch] = BATCHES, *, tied: bool = False) -> Setting:
    """No dropout; packs and chunks so small that rows share some, and need several."""
    train = TrainSection.model_validate(
        {"method": method, "lora_dropout": 0, "chunk_size": 5, "sequence_length": 20, "warmup_steps": 0}
    )
    backbone = tiny_backbone(tie_word_embeddings=tied)
    backbone.model.requires_grad_(False)
    heads = HeadsConfig(num_heads=3, num_layers=2)
    return Setting(backbone=backbone, heads=heads, train=train, batches=batches, folder=folder)


def losses(name: str, of: Setting) -> list[float]:
    trainer = Trainer(CONTENDERS[of.train.method][name](of), of.train)
    return [trainer.step(number) for number in STEPS]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_ours_and_naive_have_the_same_loss_step_after_step(method: str, name: str, tied: bool, tmp_path: Path) -> None:
    """From the second step on the loss tells of gradients, clipping and rates; for MEDUSA-2 of the KL, which begins at 0."""
    ours = losses(name, setting(tmp_path, method, tied=tied))
    naive = losses(NAIVE, setting(tmp_path, method, tied=tied))
    assert ours[0] == pytest.approx(naive[0], rel=1e-5)
    assert ours == pytest.approx(naive, rel=1e-4)
    assert ours[2] < ours[0] * 0.99, "the rows of the first step, learned from twice"


@pytest.mark.parametrize(("method", "name"), [*PAIRS, *((method, NAIVE) for method in CONTENDERS)])
def test_a_loss_is_one_per_label_position(method: str, name: str, tmp_path: Path) -> None:
    """Rows taken twice change nothing."""
    once = setting(tmp_path / "once", method, [ROWS])
    twice = setting(tmp_path / "twice", method, [[*ROWS, *ROWS]])
    found = [CONTENDERS[method][name](one).backward(0) for one in (once, twice)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_padded_rows_carry_the_labels_of_their_rows() -> None:
    batch = padded(ROWS, 3, torch.device("cpu"))
    for b, row in enumerate(ROWS):
        labels = torch.tensor(labels_of(row))
        assert batch.mask[b].sum() == len(labels)
        assert torch.equal(batch.targets[:, b, : len(labels)].T, head_targets(labels, 3))
        assert (batch.targets[:, b, len(labels) :] == IGNORE).all()
    assert (batch.own != IGNORE).sum() == num_labels("medusa2", ROWS)
    assert (batch.targets[0] != IGNORE).sum() == num_labels("medusa1", ROWS)


def test_only_the_first_epoch_runs_the_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = Backbone.hidden_states
    monkeypatch.setattr(Backbone, "hidden_states", lambda self, *ids: calls.append(1) or run(self, *ids))
    first = losses(FIRST, setting(tmp_path / "first", "medusa1"))
    assert len(calls) == len(BATCHES)
    later = setting(tmp_path / "later", "medusa1")
    for number in range(len(BATCHES)):
        keep(later, number)
    calls.clear()
    assert losses(LATER, later) == first
    assert not calls


def test_rows_of_a_file_are_those_with_a_label_for_the_heads(tmp_path: Path) -> None:
    file = tmp_path / "answers.parquet"
    said = [[5, 6, 7], [5], [8, 9]]
    pq.write_table(pa.table({"prompt_ids": [[1, 2], [3], [4]], "response_ids": said, "other": ["", "", ""]}), file)
    rows = read_rows(file, vocab_size=12)
    assert [row.response_ids for row in rows] == [said[0], said[2]]
    assert padding_share([rows]) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="holds token 9, the backbone knows 9"):
        read_rows(file, vocab_size=9)
    with pytest.raises(ValueError, match="2 batches of 2 rows need 4, there are 2"):
        draw_batches(rows, rows_of_step=2, num_batches=2, seed=0)


def test_batches_are_of_different_rows_and_the_same_for_a_seed() -> None:
    rows = random_rows(12, vocab_size=50, seed=1)
    batches = draw_batches(rows, rows_of_step=3, num_batches=4, seed=2)
    assert {row.id for batch in batches for row in batch} == {str(n) for n in range(12)}
    assert batches == draw_batches(rows, rows_of_step=3, num_batches=4, seed=2)
    assert batches != draw_batches(rows, rows_of_step=3, num_batches=4, seed=3)


def test_losses_that_differ_are_refused() -> None:
    _check_same({NAIVE: 2.0, OURS: 2.0001}, 1e-4)
    for wrong in (2.001, float("nan")):
        with pytest.raises(ValueError, match=r"the losses of the same rows differ by more than 0\.0001"):
            _check_same({NAIVE: 2.0, OURS: wrong}, 1e-4)


def job(method: str, shapes: str | None = "tiny", dtype: str = "float32") -> Job:
    train = TrainSection.model_validate({"method": method, "dtype": dtype, "warmup_steps": 0})
    return Job(
        backbone="./none", shapes=shapes, device="cpu", threads=1, heads=HeadsConfig(num_heads=3), train=train
    )  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("method", CONTENDERS)
def test_a_process_answers_each_number_of_a_batch_with_a_step(method: str, dtype: str) -> None:
    """Served here, not in processes of their own: those take seconds to begin."""
    rows = random_rows(4, vocab_size=300, seed=0)
    first = {}
    threads = torch.get_num_threads()
    for name in CONTENDERS[method]:
        ours, theirs = Pipe()
        for number in (0, 1, None):
            ours.send(number)
        serve(name, job(method, dtype=dtype), [rows[:2], rows[2:]], theirs)
        steps = [ours.recv(), ours.recv()]
        assert not ours.poll()
        assert all(step.seconds > 0 and step.peak_mib > -1 for step in steps), "the kernel counts pages loosely"
        first[name] = steps[0].loss
    torch.set_num_threads(threads)
    _check_same(first, TOLERANCE[dtype])


def test_the_peak_is_what_was_held_since_it_began() -> None:
    device = torch.device("cpu")
    before = torch.ones(64 * MIB, dtype=torch.uint8)
    del before
    start = reset_peak(device)
    assert peak_bytes(device) - start < 16 * MIB
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    assert 60 * MIB < peak_bytes(device) - start < 80 * MIB
    del held
    assert peak_bytes(device) - start > 60 * MIB, "a peak stays"


def test_a_contender_that_ends_is_told() -> None:
    """By another error than its own, so that the command ends in one line."""
    lost = job("medusa1", shapes=None)
    with (
        OwnProcess(NAIVE, lost, [ROWS]) as process,
        pytest.raises(ChildProcessError, match="'naive' ended with code 1"),
    ):
        process.step(0)


@pytest.mark.slow
def test_steps_are_measured_beside_plain_loops(tmp_path: Path) -> None:
    training_steps.main(
        method=["medusa2"], shapes="tiny", rows=3, repeats=2, num_heads=3, threads=1, output=tmp_path
    )  # fmt: skip
    (page,), (record,) = tmp_path.glob("*.md"), tmp_path.glob("*.json")
    assert page.name.startswith("training-steps-float32-cpu-")
    found = json.loads(record.read_text())["figures"]
    assert found.keys() == {"medusa2"}
    assert found["medusa2"].keys() == {NAIVE, OURS}
    for one in found["medusa2"].values():
        assert len(one["seconds"]) == len(one["speed_over_naive"]) == 2
        assert len(one["losses"]) == 3
        assert one["losses"] == pytest.approx(found["medusa2"][NAIVE]["losses"], rel=1e-2)  # dropout is drawn for each
        assert one["tokens_per_s"] > one["positions_per_s"] > 0
        assert one["peak_mib"] > 0
    assert found["medusa2"][NAIVE]["speed_over_naive"] == [1, 1]
    assert "prompts of 32 to 128 tokens" in page.read_text()


def test_what_is_not_known_is_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="unknown method 'medusa3'"):
        training_steps.main(method=["medusa3"])
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        training_steps.main(dtype="int8")
    with pytest.raises(ValueError, match="unknown shapes 'huge'"):
        training_steps.main(shapes="huge")
