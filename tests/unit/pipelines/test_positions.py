"""Hidden states of packed rows are those of the rows one by one, wherever they are kept."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from medusa.backbone import Backbone, load_backbone
from medusa.losses import IGNORE
from pipelines.config import Config
from pipelines.dataset import pack_rows
from pipelines.errors import StageError
from pipelines.hidden_cache import kept_on_disk, make_room
from pipelines.positions import Lane, Positions, PositionsReader
from pipelines.records import Answer
from pipelines.train_loop import position_lanes
from tests.tiny_models import EOS_ID, PAD_ID

NUM_HEADS, RANKS = 3, 4
ROWS = [
    Answer(id="a", prompt_id="a", prompt_ids=[5, 6, 7], response_ids=[8, 9, 10, EOS_ID]),
    Answer(id="b", prompt_id="b", prompt_ids=[11], response_ids=[12]),
    Answer(id="c", prompt_id="c", prompt_ids=[5, PAD_ID, 7, 6], response_ids=[PAD_ID, 13, 14, 15, 16, 17]),
    *[Answer(id=f"d{n}", prompt_id="d", prompt_ids=[n], response_ids=list(range(20, 30 + n))) for n in range(1, 9)],
]


@pytest.fixture(scope="module")
def backbone(tiny_folder: Path) -> Backbone:
    return load_backbone(tiny_folder, dtype="float32", fused=False)


@pytest.fixture(scope="module")
def reader(backbone: Backbone) -> PositionsReader:
    return PositionsReader(backbone=backbone, num_heads=NUM_HEADS, ranks=RANKS)


def oracle(
    backbone: Backbone, row: Answer
) -> list[tuple[torch.Tensor, list[int], list[torch.Tensor | None], list[int]]]:
    """(hidden state, targets, the backbone's distribution at each target, the tokens that follow) of a row's positions, one
    row alone."""
    tokens = row.prompt_ids + row.response_ids
    states = backbone.hidden_states(torch.tensor([tokens]))[0].detach()
    found = []
    for t in range(len(row.prompt_ids) - 1, len(tokens)):  # the last prompt token predicts the first of the answer
        inside = [t + k + 1 < len(tokens) for k in range(1, NUM_HEADS + 1)]
        if inside[0]:
            wanted = [tokens[t + k + 1] if inside[k - 1] else IGNORE for k in range(1, NUM_HEADS + 1)]
            own = [backbone.logits(states[t + k]).detach() if inside[k - 1] else None for k in range(1, NUM_HEADS + 1)]
            found.append((states[t], wanted, own, tokens[t + 1 : t + NUM_HEADS + 1]))
    return found


def test_positions_match_an_oracle_that_takes_one_row_and_one_position_at_a_time(
    backbone: Backbone, reader: PositionsReader
) -> None:
    packs = pack_rows(ROWS, 24)
    assert max(map(len, packs)) > 1
    expected = [item for pack in packs for row in pack for item in oracle(backbone, row)]
    found = reader.read_all(ROWS, 24)
    assert len(found) == len(expected) > 0
    for i, (hidden, targets, own, path) in enumerate(expected):
        torch.testing.assert_close(found.hidden[i], hidden, rtol=1e-4, atol=1e-5)
        assert found.targets[i].tolist() == targets
        assert found.path[i].tolist()[: len(path)] == path
        for k, logits in enumerate(own):
            if logits is None:
                assert found.soft_shares[i, k].sum() == 0
                continue
            best = logits.topk(RANKS)
            assert found.soft_tokens[i, k].tolist() == best.indices.tolist()
            torch.testing.assert_close(found.soft_shares[i, k].float(), best.values.softmax(-1), rtol=0, atol=2e-3)


def test_a_row_without_targets_gives_no_position(reader: PositionsReader) -> None:
    assert len(reader.read_all([ROWS[1]], 24)) == 0
    assert len(reader.read_all([], 24)) == 0


def lanes(reader: PositionsReader, workdir: Path, quota_gb: float, data: str = "x") -> Lane:
    config = Config.model_validate(
        {"workdir": workdir, "train": {"cache_quota_gb": quota_gb, "sequence_length": 24, "init_from": "none"}}
    )
    return position_lanes(config, reader, ROWS, {0: ROWS}, data=data, rank=0)[0]


def same(one: Positions, two: Positions) -> None:
    for name, value in vars(one).items():
        torch.testing.assert_close(value, vars(two)[name], msg=lambda text, name=name: f"{name}: {text}")


def test_kept_or_computed_again_a_step_sees_the_same(reader: PositionsReader, tmp_path: Path) -> None:
    kept, computed = lanes(reader, tmp_path / "a", 1.0), lanes(reader, tmp_path / "b", 0.0)
    assert (kept.kept is not None, computed.kept is not None) == (True, False)
    assert not (tmp_path / "b" / "hidden").exists()
    for step in range(9):
        same(kept.batch(step, 16), computed.batch(step, 16))


def test_positions_are_computed_once_and_mapped_by_the_next_run(
    reader: PositionsReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = lanes(reader, tmp_path, 1.0).batch(0, 16)
    monkeypatch.setattr(PositionsReader, "_forward", lambda *_: pytest.fail("computed again"))
    same(lanes(reader, tmp_path, 1.0).batch(0, 16), first)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        lanes(reader, tmp_path, 1.0, data="other answers")


def test_a_file_cut_short_is_written_again(reader: PositionsReader, tmp_path: Path) -> None:
    first = lanes(reader, tmp_path, 1.0).batch(0, 16)
    (file,) = (tmp_path / "hidden").rglob("*.hidden.bin")
    file.write_bytes(file.read_bytes()[:100])
    same(lanes(reader, tmp_path, 1.0).batch(0, 16), first)


def test_other_runs_make_room_the_oldest_first(tmp_path: Path) -> None:
    import os

    for age, name in enumerate(["new", "middle", "old"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lane.bin").write_bytes(b"0" * 1000)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    make_room(tmp_path, "mine", num_bytes=1500, quota_gb=3e-6)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["new"]
    make_room(tmp_path, "new", num_bytes=3000, quota_gb=3e-6)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["new"], "a run's own are kept"


def test_what_another_run_is_writing_is_left_alone(reader: PositionsReader, tmp_path: Path) -> None:
    def parts():  # type: ignore[no-untyped-def]
        make_room(tmp_path, "mine", num_bytes=1500, quota_gb=1e-6)
        yield positions

    positions = reader.read_all(ROWS, 24)
    same(kept_on_disk(tmp_path / "theirs" / "lane-0-of-1", parts(), reader.empty(), len(positions)), positions)
    make_room(tmp_path, "mine", num_bytes=1500, quota_gb=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_with_the_numbers(
    reader: PositionsReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))
    with pytest.raises(StageError, match=r"0 GB free.*lower train\.cache_quota_gb"):
        lanes(reader, tmp_path, 1.0)


def test_a_disk_that_fills_up_while_writing_leaves_nothing_half_written(
    reader: PositionsReader, tmp_path: Path
) -> None:
    def fails():  # type: ignore[no-untyped-def]
        yield reader.read_all(ROWS[:1], 24)
        raise OSError(28, "No space left on device")

    with pytest.raises(StageError, match="free some space"):
        kept_on_disk(tmp_path / "lane", fails(), reader.empty(), 100)
    assert list(tmp_path.glob("*.bin")) == list(tmp_path.glob("*.part")) == []


def test_what_a_killed_writer_left_makes_room_before_its_lane_is_written_again(
    reader: PositionsReader, tmp_path: Path
) -> None:
    """Also what an earlier release named after a process; other lanes are other workers' business."""
    for name in ("lane-1-of-12.hidden.part", "lane-1-of-12.hidden.4711.part", "lane-11-of-12.hidden.part"):
        (tmp_path / name).write_bytes(b"half")

    def parts():  # type: ignore[no-untyped-def]
        assert [file.name for file in tmp_path.glob("*.4711.part")] == []
        yield reader.read_all(ROWS[:1], 24)

    kept_on_disk(tmp_path / "lane-1-of-12", parts(), reader.empty(), len(reader.read_all(ROWS[:1], 24).hidden))
    assert [file.name for file in tmp_path.glob("*.part")] == ["lane-11-of-12.hidden.part"]
