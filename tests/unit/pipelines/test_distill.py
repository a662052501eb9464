"""What is asked for again and what training may use, when prompts or settings change between two distillations."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import distill
from pipelines.config import Config
from pipelines.errors import ConfigError
from pipelines.pool import RUN, Pool
from pipelines.prompts import prompt_digest
from pipelines.records import ANSWERS, CALIBRATION, TRAIN, read_answers, sampling_key, scan

TEXTS = {f"p{n}": f"question {n}" for n in range(8)}
ANSWER = distill._answer
Distil = Callable[..., distill.DistillResult]


@pytest.fixture
def answered_by(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Answers without a backbone: one file for each run. The backbone that each run was told of."""
    told: list[str | None] = []

    def answer(
        missing: list[distill.Asked], total: int, pool: Pool, config: Config, progress: object
    ) -> tuple[None, distill._Tally]:
        told.append(pool.args[-1])
        rows = [
            {
                "id": prompt.id, "prompt_id": prompt.id, "source": "s", "part": part, "prompt_ids": [1],
                "response_ids": [2, 3], "response": prompt.turns[0], "finish_reason": "stop",
                "sampling": sampling_key(config.distill, config.backbone.decodes_in), "backbone": "b", "error": None,
                "asked": prompt_digest(prompt),
            }
            for prompt, part in missing
        ]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows, schema=ANSWERS), pool.folder / f"{len(told)}.parquet")
        return None, distill._tally(pool.folder)

    monkeypatch.setattr(distill, "_answer", answer)
    return told


@pytest.fixture
def distil(tmp_path: Path, answered_by: list[str | None]) -> Distil:
    def run(
        texts: dict[str, str], *, settings: dict[str, Any] | None = None, dtype: str = "auto", **prompts: Any
    ) -> distill.DistillResult:
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join(json.dumps({"id": name, "prompt": text}) + "\n" for name, text in texts.items()))
        sections = {"prompts": {"path": file, **prompts}, "distill": settings or {}, "backbone": {"dtype": dtype}}
        return distill.run(Config.model_validate({"workdir": tmp_path, **sections}))

    return run


def _parts(folder: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in scan(folder, ["prompt_id", "part"]):
        found.setdefault(row["part"], set()).add(row["prompt_id"])
    return found


def test_a_larger_share_calibrates_with_more_of_the_answers_that_are_there(distil: Distil) -> None:
    first = distil(TEXTS, calibration_share=0.0)
    assert _parts(first.folder) == {TRAIN: set(TEXTS)}
    again = distil(TEXTS, calibration_share=0.5)
    parts = _parts(first.folder)
    assert (again.num_asked, again.num_answers) == (0, 8)
    assert parts[CALIBRATION] and parts[TRAIN] | parts[CALIBRATION] == set(TEXTS)
    assert {row.id for row in read_answers(first.folder, CALIBRATION).rows} == parts[CALIBRATION]


def test_an_edited_prompt_is_asked_again_and_its_old_answer_goes(distil: Distil) -> None:
    folder = distil(TEXTS).folder
    edited = distil(TEXTS | {"p3": "another question"})
    assert (edited.num_asked, edited.num_answers) == (1, 8)
    said = {row["id"]: row["response"] for row in scan(folder)}
    assert said == TEXTS | {"p3": "another question"}
    assert distil(TEXTS | {"p3": "another question"}).num_asked == 0


def test_answers_of_a_removed_prompt_are_not_trained_on_and_come_back_with_it(distil: Distil) -> None:
    folder = distil(TEXTS, calibration_share=0.0).folder
    few = distil({name: TEXTS[name] for name in ("p0", "p1")}, calibration_share=0.0)
    assert (few.num_asked, few.num_answers, few.num_tokens) == (0, 2, 4)
    assert [row.id for row in read_answers(folder, TRAIN).rows] == ["p0", "p1"]
    assert distil(TEXTS, calibration_share=0.0).num_asked == 0
    assert len(read_answers(folder, TRAIN).rows) == 8


class Log:
    """As JobLog: what was told of, by step."""

    told: list[tuple[int, dict[str, float]]]

    def __init__(self, *_: object) -> None:
        Log.told = []

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""

    def metrics(self, values: dict[str, float], *, step: int) -> None:
        self.told.append((step, values))


def test_mlflow_is_told_of_answers_that_fell_out_of_use_though_nothing_is_asked(
    distil: Distil, monkeypatch: pytest.MonkeyPatch
) -> None:
    distil(TEXTS)
    monkeypatch.setattr(distill, "_answer", ANSWER)
    monkeypatch.setattr(distill, "JobLog", Log)
    few = distil({name: TEXTS[name] for name in ("p0", "p1")})
    assert (few.num_asked, few.tokens_per_s) == (0, None)
    assert Log.told == [(8, {"tokens": 4, "finish_stop": 2, "finish_length": 0, "finish_error": 0})]
    monkeypatch.setattr(distill, "JobLog", lambda *_: pytest.fail("opened"))
    assert distil({name: TEXTS[name] for name in ("p0", "p1")}).num_answers == 2


def test_answers_of_an_earlier_release_which_do_not_say_what_was_asked_stand(distil: Distil) -> None:
    folder = distil(TEXTS, calibration_share=0.0).folder
    (file,) = folder.glob("*.parquet")
    pq.write_table(pq.read_table(file).drop_columns(["asked"]), file)
    assert distil(TEXTS, calibration_share=0.5).num_asked == 0
    assert _parts(folder)[CALIBRATION]
    assert all(row["asked"] is None for row in scan(folder))


def test_a_disk_that_is_full_while_parts_are_written_loses_no_answer(
    distil: Distil, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = distil(TEXTS, calibration_share=0.0).folder
    before = list(scan(folder))

    def full(table: pa.Table, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        with pytest.raises(OSError, match="No space left"):  # one line in `run_stage`
            distil(TEXTS, calibration_share=0.5)
    assert list(scan(folder)) == before
    assert distil(TEXTS, calibration_share=0.5).num_asked == 0


def test_other_settings_are_refused_also_where_all_that_is_there_is_a_dead_runs(distil: Distil) -> None:
    folder = distil(TEXTS, settings={"max_tokens": 8}).folder
    (file,) = folder.glob("*.parquet")
    (folder / f"{RUN}dead").mkdir()
    file.rename(folder / f"{RUN}dead" / "0.parquet")
    with pytest.raises(ConfigError, match=r'"max_tokens": 8.*asked for is .*"max_tokens": 9'):
        distil(TEXTS, settings={"max_tokens": 9})


def test_answers_in_another_dtype_are_other_answers(distil: Distil) -> None:
    distil({"p0": TEXTS["p0"]}, dtype="auto")
    assert distil(TEXTS, dtype="bfloat16").num_done_before == 1  # what auto means
    with pytest.raises(ConfigError, match=r'"dtype": "bfloat16".*asked for is .*"dtype": "int8"'):
        distil(TEXTS, dtype="int8")


def test_answers_of_an_earlier_release_which_do_not_say_their_dtype_stand(distil: Distil) -> None:
    folder = distil({"p0": TEXTS["p0"]}, dtype="int8").folder
    (file,) = folder.glob("*.parquet")
    table = pq.read_table(file)
    earlier = pa.array(['{"max_tokens": 256, "seed": 0, "temperature": 0.0, "top_p": 1.0}'])
    pq.write_table(table.set_column(ANSWERS.get_field_index("sampling"), ANSWERS.field("sampling"), earlier), file)
    for dtype in ("auto", "int8"):
        assert distil({"p0": TEXTS["p0"]}, dtype=dtype).num_done_before == 1
    with pytest.raises(ConfigError, match=r'"seed": 0.*asked for is .*"seed": 1'):
        distil(TEXTS, settings={"seed": 1})
    assert distil(TEXTS, dtype="int8").num_done_before == 1
    with pytest.raises(ConfigError, match=r'"dtype": "int8".*asked for is .*"dtype": "bfloat16"'):
        distil(TEXTS)  # from here on there are some that say it


def test_actors_are_told_whose_answers_are_there(distil: Distil, answered_by: list[str | None]) -> None:
    distil({"p0": TEXTS["p0"]})
    distil(TEXTS)
    assert answered_by == [None, "b"]
