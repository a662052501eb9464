"""What is saved loads back equal; what is not whole, not ours or not for this backbone is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa.checkpoint import CONFIG, WEIGHTS, load_checkpoint, save_checkpoint
from medusa.errors import CheckpointError
from medusa.folders import whole_folder
from tests.unit.medusa.tiny import random_heads, tiny_backbone

BACKBONE = tiny_backbone()
PATHS = [(0,), (1,), (0, 0), (0, 0, 1)]


def saved(folder: Path, **shape: object) -> Path:
    heads = random_heads(BACKBONE, **shape)  # type: ignore[arg-type]
    return save_checkpoint(
        folder / "heads", heads, paths=PATHS, backbone_name="tiny", backbone_fingerprint=BACKBONE.fingerprint,
        default_nodes=3, temperatures=(0.5, 1.0, 2.25),
        accuracy=[[0.5, 0.1], [0.25, 0.125], [0.1, 0.0]], card={"data": {"rows": 7}}, dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("lm_heads", ["shared", "own"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_saved_checkpoint_loads_back_equal(tmp_path: Path, lm_heads: str, num_layers: int) -> None:
    folder = saved(tmp_path, lm_heads=lm_heads, num_layers=num_layers)
    back = load_checkpoint(folder, backbone=BACKBONE)
    want = random_heads(BACKBONE, lm_heads=lm_heads, num_layers=num_layers)
    assert back.heads.config == want.config
    for name, weight in want.named_parameters():
        assert torch.equal(back.heads.get_parameter(name), weight)
    assert back.paths == PATHS and back.default_nodes == 3
    assert back.temperatures == back.dynamic_tree(4).temperatures == (0.5, 1.0, 2.25)
    assert back.accuracy == [[0.5, 0.1], [0.25, 0.125], [0.1, 0.0]]
    assert back.tree().paths == ((), (0,), (1,)) and back.tree(5).num_nodes == 5
    card = (folder / "README.md").read_text()
    assert "rows: 7" in card and "| 1 | 0.500 |" in card


def test_the_tokens_that_heads_guess_among_come_back(tmp_path: Path) -> None:
    some = torch.tensor([0, 3, 4, 11])
    folder = saved(tmp_path, vocabulary=some)
    assert torch.equal(load_checkpoint(folder, backbone=BACKBONE).heads.vocabulary, some)
    assert load_checkpoint(saved(tmp_path), backbone=BACKBONE).heads.vocabulary is None


@pytest.mark.parametrize("ids", [[3, 0], [0, 0], [5, 12], [-1, 2], []])
def test_a_vocabulary_that_is_none_is_refused(tmp_path: Path, ids: list[int]) -> None:
    folder = saved(tmp_path)
    weights = load_file(folder / WEIGHTS) | {"vocabulary": torch.tensor(ids, dtype=torch.int32)}
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="ascending token ids below 12"):
        load_checkpoint(folder)


def test_the_number_of_heads_comes_from_the_tensors_not_from_a_config_that_lies(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"num_heads": 9, "num_layers": 4, "lm_heads": "own"}))
    assert load_checkpoint(folder, backbone=BACKBONE).heads.num_heads == 3


def rewrite(folder: Path, change: str) -> None:
    weights = load_file(folder / WEIGHTS)
    name = "heads.1.blocks.0.bias"
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        weights["heads.0.blocks.5.bias"] = torch.zeros(32)
    elif change == "foreign":
        weights["medusa_head.0.0.linear.weight"] = torch.zeros(2, 2)
    elif change == "mis-shaped":
        weights[name] = torch.zeros(31)
    elif change == "cut":
        weights["heads.0.blocks.0.weight"] = weights["heads.0.blocks.0.weight"][:-1].clone()
    elif change == "NaN":
        weights[name] = torch.full((32,), float("nan"))
    save_file(weights, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing", "missing: heads.1.blocks.0.bias"),
        ("unexpected", "missing: heads.0.blocks.1.bias"),
        ("foreign", "unexpected tensors.*medusa_head"),
        ("mis-shaped", "mis-shaped: heads.1.blocks.0.bias"),
        ("cut", "heads.0.blocks.0.weight must be square"),
        ("NaN", "NaN or infinite"),
    ],
)
def test_a_changed_set_of_tensors_is_refused_by_name(tmp_path: Path, change: str, said: str) -> None:
    folder = saved(tmp_path)
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(folder, backbone=BACKBONE)


@pytest.mark.parametrize(
    ("lm_heads", "name", "tensor", "said"),
    [
        ("own", "vocabulary", torch.tensor([0, 3]), "holds a vocabulary"),
        ("own", "heads.0.lm_head.weight", torch.tensor(1.0), r"lm_heads must be \[V,D\]"),
        ("shared", "heads.99999999.blocks.0.bias", torch.zeros(32), "numbers 100000000 heads"),
        ("shared", f"heads.{'9' * 5000}.blocks.0.bias", torch.zeros(32), "unexpected tensors"),
        ("shared", "heads.1.blocks.0.bias", torch.zeros(32).long(), "tensors of torch.int64"),
    ],
)
def test_a_tensor_that_no_heads_could_have_is_refused(
    tmp_path: Path, lm_heads: str, name: str, tensor: torch.Tensor, said: str
) -> None:
    folder = saved(tmp_path, lm_heads=lm_heads)
    save_file(load_file(folder / WEIGHTS) | {name: tensor}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_what_is_loaded_and_saved_again_is_not_rounded(tmp_path: Path, dtype: torch.dtype) -> None:
    told = dict(paths=PATHS, backbone_name="tiny", backbone_fingerprint=BACKBONE.fingerprint)
    first = save_checkpoint(tmp_path / "a", random_heads(BACKBONE), dtype=dtype, **told)  # type: ignore[arg-type]
    back = load_checkpoint(first)
    again = save_checkpoint(tmp_path / "b", back.heads, dtype=back.dtype, **told)  # type: ignore[arg-type]
    assert (again / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()


@pytest.mark.parametrize("file", ["config.json", "tree.json", WEIGHTS])
def test_missing_and_truncated_files_are_named(tmp_path: Path, file: str) -> None:
    folder = saved(tmp_path)
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=file):
        load_checkpoint(folder, backbone=BACKBONE)
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=f"{file} is missing"):
        load_checkpoint(folder, backbone=BACKBONE)


def test_a_folder_that_is_none_or_not_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no heads folder"):
        load_checkpoint(tmp_path / "nowhere")
    (tmp_path / CONFIG).write_text('{"medusa_num_heads": 4}')
    with pytest.raises(CheckpointError, match="not a heads checkpoint"):
        load_checkpoint(tmp_path)


def test_another_backbone_is_refused_unless_forced_and_another_shape_always(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    other = tiny_backbone(seed=5)
    with pytest.raises(CheckpointError, match=f"fingerprint {BACKBONE.fingerprint}.*--force"):
        load_checkpoint(folder, backbone=other)
    assert load_checkpoint(folder, backbone=other, force=True).heads.num_heads == 3
    with pytest.raises(CheckpointError, match="hidden size 32 and vocabulary 12"):
        load_checkpoint(folder, backbone=tiny_backbone(vocab_size=20), force=True)


def test_a_tree_that_the_heads_cannot_fill_is_refused_on_both_sides(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 deep but there are 3"):
        save_checkpoint(
            tmp_path / "x",
            random_heads(BACKBONE),
            paths=[(0,) * n for n in range(1, 5)],
            backbone_name="t",
            backbone_fingerprint="f",
        )
    assert not (tmp_path / "x").exists()
    folder = saved(tmp_path)
    (folder / "tree.json").write_text('{"paths": [[0, 1]]}')
    with pytest.raises(CheckpointError, match="prefix-closed"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"default_nodes": 6}, r"default_nodes must lie in \[1, 5\] with this tree, got 6"),
        ({"default_nodes": 0}, "got 0"),
        ({"default_nodes": True}, "got True"),
        ({"accuracy": [[0.5, 0.1]] * 2}, "accuracy must be 3 rows of equally many numbers"),
        ({"accuracy": [[0.5], [0.5], [0.5]]}, "2 or more for this tree"),
        ({"accuracy": [[0.5, 0.1], [0.5, 0.1], [0.5, 0.1, 0.1]]}, "equally many"),
        ({"accuracy": [[0.5, 1.5]] * 3}, "got .*1.5"),
        ({"accuracy": [[0.5, "x"]] * 3}, "accuracy must be"),
        ({"accuracy": 0.5}, "got 0.5"),
        ({"paths": [(0,), (1,), (0,), (0, 0)]}, "4 tree paths make 3 nodes"),
        ({"paths": [(), (0,), (1,), (0, 0)]}, "4 tree paths make 3 nodes"),
    ],
)
def test_a_tree_its_size_and_its_accuracy_must_agree_on_both_sides(
    tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    told = {"paths": PATHS, "backbone_name": "tiny", "backbone_fingerprint": "f", **wrong}
    with pytest.raises(ValueError, match=said):
        save_checkpoint(tmp_path / "x", random_heads(BACKBONE), **told)
    assert not (tmp_path / "x").exists()
    folder = saved(tmp_path)
    for name in (CONFIG, "tree.json"):
        known = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(known | {key: wrong[key] for key in wrong if key in known}))
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(folder)


def test_what_a_killed_writer_took_away_is_put_back_by_the_next(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    for left in (".heads-abcd_123", ".heads-more-abcd_123"):
        (tmp_path / left).mkdir()
    folder.rename(tmp_path / ".heads-abcd_123" / "old")
    (tmp_path / ".heads-more-abcd_123" / "old").mkdir()
    with pytest.raises(OSError, match="full"), whole_folder(folder):
        raise OSError("full")
    assert load_checkpoint(folder).paths == PATHS


def test_saving_again_replaces_the_folder_whole(tmp_path: Path) -> None:
    folder = saved(tmp_path, num_layers=2)
    saved(tmp_path, num_layers=1)
    assert load_checkpoint(folder).heads.config.num_layers == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["heads"], "nothing half-written is left"


@pytest.mark.parametrize("value", [[1.0, 2.0], [1.0, 0.0, 1.0], [1.0, "2", 1.0], 1.0])
def test_temperatures_that_are_none_are_refused(tmp_path: Path, value: object) -> None:
    folder = saved(tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"temperatures": value}))
    with pytest.raises(CheckpointError, match="temperatures must be 3 numbers above 0"):
        load_checkpoint(folder)


def test_fingerprints_tell_weights_apart_and_not_types() -> None:
    same = tiny_backbone(dtype=torch.float64)
    assert same.fingerprint == BACKBONE.fingerprint != tiny_backbone(seed=1).fingerprint
