from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import medusa
from medusa.adapters import Adapters
from medusa.backbone import load_backbone
from medusa.checkpoint import save_checkpoint
from medusa.config import HeadsConfig
from medusa.engine import Engine
from medusa.heads import MedusaHeads
from medusa.native.build import library
from pipelines.answering import (
    TREE_BATCH_LIMIT,
    Answerer,
    answer_prompts,
    cache_bytes,
    choose_tree,
    make_engine,
    prompt_table,
    refuse_tuned,
    sampling_seed,
    turn_id,
)
from pipelines.answering import _prompt as _read
from pipelines.config import BackboneSection, Config, DistillSection
from pipelines.errors import StageError
from pipelines.pool import adopt
from pipelines.prompts import Prompt
from pipelines.records import ANSWERS, CALIBRATION, TRAIN, read_answers, sampling_key, scan
from tests.unit.medusa.tiny import random_heads

SETTINGS = DistillSection(max_tokens=12)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> medusa.Model:
    return medusa.load(tiny_folder, heads=None, dtype="float32")


def _engine(model: medusa.Model) -> Engine:
    return Engine(model.backbone, max_batch_size=3, context_length=128)


def _prompt(name: str, *turns: str, system: str | None = None) -> Prompt:
    return Prompt(id=name, source="test", turns=turns, system=system)


def _table(rows: list[dict[str, object]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=ANSWERS)


def _row(name: str, **changed: object) -> dict[str, object]:
    row: dict[str, object] = dict(
        id=name, prompt_id=name, source="s", part=TRAIN, prompt_ids=[1], response_ids=[2, 3], response="x",
        finish_reason="stop", sampling=sampling_key(SETTINGS, "float32"), backbone="b", error=None,
    )  # fmt: skip
    return row | changed


def test_a_batch_answers_as_each_prompt_alone(model: medusa.Model) -> None:
    asked = [(_prompt(f"p{i}", f"question {i}", system="be kind" if i % 2 else None), TRAIN) for i in range(5)]
    together = {row["id"]: row for row in answer_prompts(model, _engine(model), asked, SETTINGS)}
    assert together.keys() == {f"p{i}" for i in range(5)}
    for one in asked:
        (alone,) = answer_prompts(model, _engine(model), [one], SETTINGS)
        assert alone == together[one[0].id]
        assert len(alone["response_ids"]) == 12 or alone["finish_reason"] == "stop"
    _table(list(together.values())).validate(full=True)


def test_a_later_turn_stands_behind_the_backbones_own_earlier_answer(model: medusa.Model) -> None:
    rows = {
        row["id"]: row for row in answer_prompts(model, _engine(model), [(_prompt("p", "one", "two"), TRAIN)], SETTINGS)
    }
    second = rows[turn_id("p", 2)]
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": rows["p"]["response"]},
        {"role": "user", "content": "two"},
    ]
    assert second["prompt_ids"] == model.encode(messages)
    assert second["prompt_id"] == "p"


def test_what_cannot_be_answered_is_a_row_with_its_error_and_the_others_go_on(model: medusa.Model) -> None:
    asked = [(_prompt("long", "word " * 200, "never asked"), TRAIN), (_prompt("fine", "hello"), CALIBRATION)]
    rows = {row["id"]: row for row in answer_prompts(model, _engine(model), asked, SETTINGS)}
    assert rows.keys() == {"long", "fine"}
    assert "context" in rows["long"]["error"]
    assert rows["long"]["response_ids"] == []
    assert rows["fine"]["error"] is None


def test_sampled_answers_depend_on_seed_and_id_alone(model: medusa.Model) -> None:
    settings = SETTINGS.model_copy(update={"temperature": 1.0})
    asked = [(_prompt(f"p{i}", "the same question"), TRAIN) for i in range(3)]
    first = {row["id"]: row["response_ids"] for row in answer_prompts(model, _engine(model), asked, settings)}
    again = {row["id"]: row["response_ids"] for row in answer_prompts(model, _engine(model), asked[::-1], settings)}
    assert first == again
    assert len({tuple(ids) for ids in first.values()}) > 1


def test_turns_of_many_chats_share_a_batch_and_each_is_as_it_would_be_alone(model: medusa.Model) -> None:
    asked = [(_prompt(f"p{i}", *(f"turn {turn} of {i}" for turn in range(1 + i % 3))), TRAIN) for i in range(7)]
    asked.append((_prompt("long", "short", "word " * 200, "never asked"), TRAIN))
    rows = answer_prompts(model, _engine(model), asked, SETTINGS)
    together = {row["id"]: row for row in rows}
    assert len(together) == len(rows) == sum(1 + i % 3 for i in range(7)) + 2
    for one in asked:
        alone = answer_prompts(model, _engine(model), [one], SETTINGS)
        assert alone == [together[row["id"]] for row in alone]
    assert "context" in together["long/2"]["error"]
    assert "long/3" not in together


def test_a_prompts_own_settings_win_over_the_configured(model: medusa.Model) -> None:
    warm = SETTINGS.model_copy(update={"temperature": 1.0, "top_p": 0.9})
    own = Prompt(id="p", source="test", turns=("a question",), temperature=1.0, top_p=0.9)
    (configured,) = answer_prompts(model, _engine(model), [(_prompt("p", "a question"), TRAIN)], warm)
    (given,) = answer_prompts(model, _engine(model), [(own, TRAIN)], SETTINGS)
    same = {"sampling": "", "asked": ""}
    assert given | same == configured | same
    assert (given["temperature"], given["top_p"], given["seed"]) == (1.0, 0.9, sampling_seed(SETTINGS.seed, "p"))
    (other,) = answer_prompts(model, _engine(model), [(replace(own, seed=9), TRAIN)], SETTINGS)
    assert other["response_ids"] != given["response_ids"]
    table = prompt_table([(replace(own, seed=9), TRAIN), (_prompt("q", "x", "y", system="s"), CALIBRATION)])
    assert [_read(row) for row in table.to_pylist()] == [replace(own, seed=9), _prompt("q", "x", "y", system="s")]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_heads_change_the_number_of_steps_and_not_the_text(model: medusa.Model, temperature: float) -> None:
    heads = MedusaHeads(
        HeadsConfig(num_heads=2), hidden_size=model.backbone.hidden_size, vocab_size=model.backbone.vocab_size
    )
    fast = medusa.Model(model.backbone, heads)
    nodes = fast.tree.num_nodes
    settings = SETTINGS.model_copy(update={"temperature": temperature, "tree_nodes": nodes, "batch_size": 3})
    asked = [(_prompt(f"p{i}", f"question {i}", "and then?"), TRAIN) for i in range(5)]
    engine = make_engine(fast, settings)
    assert engine.tree.num_nodes == nodes > 1
    rows = {row["id"]: row for row in answer_prompts(fast, engine, asked, settings)}
    assert rows == {row["id"]: row for row in answer_prompts(model, _engine(model), asked, settings)}


def test_a_large_batch_decodes_plainly_unless_a_tree_is_asked_for(model: medusa.Model) -> None:
    heads = MedusaHeads(
        HeadsConfig(num_heads=2), hidden_size=model.backbone.hidden_size, vocab_size=model.backbone.vocab_size
    )
    fast = medusa.Model(model.backbone, heads)
    limit = TREE_BATCH_LIMIT["cpu"]
    sizes = {
        (batch, nodes): choose_tree(fast, DistillSection(batch_size=batch, tree_nodes=nodes)).num_nodes
        for batch in (limit, limit + 1)
        for nodes in (None, 1, fast.tree.num_nodes)
    }
    own = fast.tree.num_nodes
    assert sizes == {
        (limit, None): own, (limit, 1): 1, (limit, own): own,
        (limit + 1, None): 1, (limit + 1, 1): 1, (limit + 1, own): own,
    }  # fmt: skip


def test_too_little_memory_says_what_to_lower(model: medusa.Model) -> None:
    bytes_of_one = cache_bytes(model, 1, 100)
    assert cache_bytes(model, 3, 200) == 6 * bytes_of_one
    assert bytes_of_one == model.backbone.new_cache(num_slots=1, capacity=100).store.nbytes
    with pytest.raises(StageError, match=r"lower distill\.batch_size or distill\.context_length"):
        make_engine(model, DistillSection(batch_size=10**9))


def test_ids_that_look_like_a_turn_of_another_prompt_stay_apart(tmp_path: Path) -> None:
    rows = [_row("p"), _row("p/2", prompt_id="p"), _row("p/2", response_ids=[9])]
    pq.write_table(_table(rows), tmp_path / "1.parquet")
    assert sorted(row.prompt_id for row in read_answers(tmp_path, TRAIN).rows) == ["p", "p", "p/2"]


def test_reading_drops_failures_and_doubles_and_keeps_parts_apart(tmp_path: Path) -> None:
    rows = [_row("a"), _row("a"), _row("b", error="too long", response_ids=[]), _row("c", part=CALIBRATION)]
    pq.write_table(_table(rows), tmp_path / "1.parquet")
    assert [row.id for row in read_answers(tmp_path, TRAIN).rows] == ["a"]
    assert [row.id for row in read_answers(tmp_path, CALIBRATION).rows] == ["c"]


@pytest.mark.parametrize("place", [60, -30])
def test_answers_that_are_damaged_are_named(tmp_path: Path, place: int) -> None:
    """In the middle of a page, and in the footer."""
    file = tmp_path / "1.parquet"
    pq.write_table(_table([_row(str(n)) for n in range(50)]), file)
    content = bytearray(file.read_bytes())
    content[place : place + 20] = bytes(255 - byte for byte in content[place : place + 20])
    file.write_bytes(content)
    with pytest.raises(StageError, match=rf"{file} is not a file of distilled answers that can be read") as caught:
        read_answers(tmp_path, TRAIN)
    assert "\n" not in str(caught.value)


def test_a_text_that_is_no_utf8_is_named_with_its_file(tmp_path: Path) -> None:
    pq.write_table(_table([_row("a", sampling="S" * 40)]), tmp_path / "1.parquet", compression="none")
    content = (tmp_path / "1.parquet").read_bytes()
    (tmp_path / "1.parquet").write_bytes(content.replace(b"S" * 40, b"\xff" * 40))
    with pytest.raises(StageError, match=r"1\.parquet is not a file of distilled answers that can be read"):
        read_answers(tmp_path, TRAIN)


def test_training_reads_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(_table([_row("a")]), tmp_path / "1.parquet")
    asked: list[str] = []
    read_table = pq.read_table

    def read(file: Path, *, columns: list[str]) -> pa.Table:
        asked.extend(columns)
        return read_table(file, columns=columns)

    monkeypatch.setattr(pq, "read_table", read)
    assert len(read_answers(tmp_path, TRAIN).rows) == 1
    assert not {"response", "source", "finish_reason"} & set(asked)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32", "int8"])
def test_an_actors_answers_say_the_settings_that_were_asked_for(dtype: str, tiny_folder: Path) -> None:
    if dtype == "int8" and library() is None:
        pytest.skip("no C compiler here")
    backbone = BackboneSection(name=str(tiny_folder), dtype=dtype)
    settings = SETTINGS.model_copy(update={"heads": "none", "context_length": 120, "threads": 1})
    (row,) = Answerer(backbone, settings)(prompt_table([(_prompt("p", "hello"), TRAIN)])).to_pylist()
    assert row["sampling"] == sampling_key(settings, backbone.decodes_in)


def test_an_actor_with_another_backbone_than_the_answers_refuses_to_mix_them(
    model: medusa.Model, tiny_folder: Path
) -> None:
    backbone = BackboneSection(name=str(tiny_folder), dtype="float32")
    settings = SETTINGS.model_copy(update={"heads": "none", "context_length": 120, "threads": 1})
    batch = prompt_table([(_prompt("p", "hello"), TRAIN)])
    with pytest.raises(StageError, match=r"written by backbone another.*use another workdir"):
        Answerer(backbone, settings, "another")(batch)
    assert Answerer(backbone, settings, model.backbone.fingerprint)(batch).num_rows == 1


def test_the_fingerprint_is_of_the_content_not_of_the_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    pq.write_table(_table([_row("a"), _row("b")]), one / "x.parquet")
    pq.write_table(_table([_row("b")]), two / "y.parquet")
    pq.write_table(_table([_row("a")]), two / "z.parquet")
    assert read_answers(one, TRAIN).fingerprint == read_answers(two, TRAIN).fingerprint
    pq.write_table(_table([_row("a", response_ids=[4])]), two / "z.parquet")
    assert read_answers(one, TRAIN).fingerprint != read_answers(two, TRAIN).fingerprint


def test_nothing_foreign_files_and_mixed_backbones_are_told(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="run `distill`"):
        read_answers(tmp_path, TRAIN)
    pq.write_table(_table([_row("a"), _row("b", backbone="other")]), tmp_path / "x.parquet")
    with pytest.raises(StageError, match="2 backbones"):
        read_answers(tmp_path, TRAIN)
    (tmp_path / "y.parquet").write_text("torn")
    with pytest.raises(StageError, match=r"y\.parquet"):
        list(scan(tmp_path))


def test_whole_files_of_a_dead_run_are_kept_and_torn_ones_dropped(tmp_path: Path) -> None:
    dead = tmp_path / ".run-dead"
    dead.mkdir()
    pq.write_table(_table([_row("a"), _row("b")]), dead / "0.parquet")
    whole = (dead / "0.parquet").read_bytes()
    (dead / "1.parquet").write_bytes(whole[: len(whole) // 2])
    assert adopt(tmp_path) == 2
    assert not dead.exists()
    assert sorted(row["id"] for row in scan(tmp_path)) == ["a", "b"]
    assert adopt(tmp_path) == 0


def test_the_layout_is_below_the_working_directory(tmp_path: Path) -> None:
    layout = Config(workdir=tmp_path).layout
    names = [name for name in dir(type(layout)) if isinstance(getattr(type(layout), name), property)]
    assert names
    assert all(getattr(layout, name).is_relative_to(tmp_path) for name in names)


def test_heads_that_tuned_the_backbone_do_not_answer_for_the_original(tiny_folder: Path, tmp_path: Path) -> None:
    backbone = load_backbone(tiny_folder, dtype="float32")
    heads = random_heads(backbone)
    tuned = Adapters(kind="full", tensors={"model.norm.weight": torch.ones(backbone.hidden_size)})
    for name, adapters in (("one", None), ("two", tuned)):
        save_checkpoint(
            tmp_path / name, heads, paths=[(0,)], backbone_name=backbone.name,
            backbone_fingerprint=backbone.fingerprint, adapters=adapters,
        )  # fmt: skip

    untuned, both = (medusa.load(tiny_folder, heads=tmp_path / name, dtype="float32") for name in ("one", "two"))
    refuse_tuned(untuned, "one")
    with pytest.raises(StageError, match="MEDUSA-2"):
        refuse_tuned(both, "two")
