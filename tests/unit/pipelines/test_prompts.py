from __future__ import annotations

import json
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medusa.errors import PromptError
from pipelines.builtin_prompts import BUILTIN
from pipelines.config import Config, EvaluateSection, PromptsSection, dump_config, load_config
from pipelines.errors import ConfigError
from pipelines.prompts import (
    Prompt,
    builtin_prompts,
    evaluation_prompts,
    parse_prompt,
    prompt_parts,
    read_prompts,
    share_of,
)

SHAPES: list[tuple[dict[str, Any], tuple[str, ...], str | None]] = [
    ({"prompt": "a"}, ("a",), None),
    ({"text": " a "}, ("a",), None),
    ({"question": "a"}, ("a",), None),
    ({"turns": ["a", "b"]}, ("a", "b"), None),
    ({"instruction": "do", "input": ""}, ("do",), None),
    ({"instruction": "do", "input": "this"}, ("do\n\nthis",), None),
    ({"messages": [{"role": "user", "content": "a"}]}, ("a",), None),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, ("a",), None),
    ({"prompt": [{"role": "user", "content": "a"}]}, ("a",), None),
    (
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "not kept"},
                {"role": "user", "content": "b"},
            ]
        },
        ("a", "b"),
        "s",
    ),
    (
        {"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": "a"}]},
        ("a",),
        "s",
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "x"},
                {"from": "human", "value": "b"},
            ]
        },
        ("a", "b"),
        None,
    ),
]


@pytest.mark.parametrize(("row", "turns", "system"), SHAPES)
def test_each_shape_gives_the_users_turns(row: dict[str, Any], turns: tuple[str, ...], system: str | None) -> None:
    prompt = parse_prompt(row, source="s")
    assert (prompt.turns, prompt.system) == (turns, system)
    assert prompt.id == parse_prompt(row, source="s").id


@pytest.mark.parametrize("roles", [("system", "developer", "user"), ("user", "assistant", "developer", "user")])
def test_a_system_message_that_cannot_be_kept_is_refused_by_name(roles: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="a developer message that is not the one at the beginning"):
        parse_prompt({"messages": [{"role": role, "content": role} for role in roles]}, source="s")


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"prompt": ""},
        {"prompt": 3},
        {"turns": []},
        {"turns": ["a", " "]},
        {"messages": [{"content": "a"}]},
        {"messages": ["a"]},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [{"role": "user", "content": None}]},
        {"prompt": "half \ud83d of a character"},
        {"prompt": "a", "temperature": -1},
        {"prompt": "a", "temperature": float("nan")},
        {"prompt": "a", "temperature": float("inf")},
        {"prompt": "a", "temperature": 10**400},
        {"prompt": "a", "top_p": 0},
        {"prompt": "a", "seed": 1.5},
    ],
)
def test_what_is_no_prompt_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_prompt(row, source="s")


def test_a_refusal_names_every_shape_that_is_read() -> None:
    with pytest.raises(ValueError, match="among its keys") as refused:
        parse_prompt({"foo": "bar"}, source="s")
    for key in ("prompt", "text", "question", "instruction"):
        assert parse_prompt({key: "Why?"}, source="s").turns == ("Why?",)
        assert key in str(refused.value)


def test_a_bad_line_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": \n\n[1]\n{"nothing": 1}\n{"prompt": "b"}\n{"prompt": "a"}\n')
    told: list[str] = []
    prompts = read_prompts(file, report=told.append)
    assert [prompt.turns for prompt in prompts] == [("a",), ("b",)]
    assert [message.removeprefix(f"{file}:").split(" is left out: ")[0] for message in told] == ["2", "4", "5"]
    assert "not valid JSON" in told[0]


@pytest.mark.parametrize(
    "bad",
    [
        '{"prompt": "a", "temperature": ' + "9" * 400 + "}",
        '{"prompt": "a", "id": ' + "9" * 5000 + "}",
        '{"prompt": ' + "[" * 10**5 + "]" * 10**5 + "}",
        '{"prompt": [{"role": "user", "content": ' + '[{"type": "text", "text": ' * 400 + '"a"' + "}]" * 400 + "}]}",
    ],
    ids=["a temperature of 400 digits", "an id of 5,000 digits", "brackets without end", "parts within parts"],
)
def test_a_line_beyond_python_is_named_and_the_others_go_on(bad: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "a"}}\n{bad}\n{{"prompt": "b"}}\n')
    told: list[str] = []
    assert len(read_prompts(tmp_path / "p.jsonl", report=told.append)) == 2
    (message,) = told
    assert message.startswith(f"{tmp_path}/p.jsonl:2 is left out: ")


def test_jsonl_and_parquet_of_the_same_rows_are_the_same_prompts(tmp_path: Path) -> None:
    rows = [{"id": str(i), "source": "x", "prompt": f"p{i}"} for i in range(5)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.jsonl") == read_prompts(tmp_path / "p.parquet")


def test_prompts_with_one_id_are_told_apart_in_any_order_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1, "prompt": "a"}\n{"id": 2, "prompt": "c"}\n{"id": 1, "prompt": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"id": 1, "prompt": "b"}\n{"id": 2, "prompt": "c"}\n')
    one = read_prompts([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    two = read_prompts([tmp_path / "b.jsonl", tmp_path / "a.jsonl"])
    assert [prompt.turns[0] for prompt in one] == ["a", "c", "b"]
    ids = {prompt.turns: prompt.id for prompt in one}
    assert ids == {prompt.turns: prompt.id for prompt in two}
    assert len(set(ids.values())) == 3
    assert ids["c",] == "2"


def test_equal_prompts_without_ids_in_two_files_are_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "same", "category": "{name}"}}\n')
    (prompt,) = read_prompts(tmp_path)
    assert prompt.source == "a"


def test_a_row_may_carry_its_own_sampling(tmp_path: Path) -> None:
    prompt = parse_prompt({"prompt": "a", "temperature": 1, "top_p": 0.5, "seed": 7}, source="s")
    assert (prompt.temperature, prompt.top_p, prompt.seed) == (1.0, 0.5, 7)
    assert prompt.id != parse_prompt({"prompt": "a"}, source="s").id


def test_missing_foreign_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl"):
        read_prompts(tmp_path / "nowhere.jsonl")
    (tmp_path / "x.parquet").write_text("not parquet")
    with pytest.raises(ConfigError, match=r"x\.parquet"):
        read_prompts(tmp_path / "x.parquet")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(PromptError, match=r"empty\.jsonl"):
        read_prompts(tmp_path / "empty.jsonl")


def test_the_built_in_parts_are_disjoint_and_complete() -> None:
    parts = [builtin_prompts(name) for name in ("train", "calibration", "evaluation")]
    texts = [prompt.turns[0] for part in parts for prompt in part]
    assert sorted(texts) == sorted(text for kind in BUILTIN.values() for text in kind)
    assert len(set(texts)) == len(texts) == 120
    assert len({prompt.id for part in parts for prompt in part}) == 120


def test_any_start_of_the_built_in_prompts_is_wide() -> None:
    for part in ("train", "calibration", "evaluation"):
        assert {prompt.source for prompt in builtin_prompts(part)[:12]} == {f"builtin/{kind}" for kind in BUILTIN}


def test_a_files_parts_are_disjoint_stable_and_cut(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    lines = [json.dumps({"turns": [f"p{i}", "more", "and more"]}) for i in range(200)]
    file.write_text("\n".join(lines))
    config = PromptsSection(path=(str(file),), calibration_share=0.25, max_turns=2)
    parts = prompt_parts(config)
    train, calibration = {p.id for p in parts.train}, {p.id for p in parts.calibration}
    assert not train & calibration
    assert len(train | calibration) == 200
    assert 20 < len(calibration) < 80  # 50 expected, six sigma
    assert all(len(prompt.turns) == 2 for prompt in parts.train)
    file.write_text("\n".join(reversed(lines)))
    assert {p.id for p in prompt_parts(config).train} == train
    assert len(prompt_parts(config.model_copy(update={"limit": 3})).train) == 3


def test_of_few_prompts_one_is_for_calibration(tmp_path: Path) -> None:
    """The one that chance puts nearest, so that the order of rows does not choose."""
    rows = [json.dumps({"id": str(i), "prompt": f"p{i}"}) for i in range(6)]
    chosen = set()
    for lines in (rows, rows[::-1]):
        (tmp_path / "p.jsonl").write_text("\n".join(lines))
        parts = prompt_parts(PromptsSection(path=(f"{tmp_path}/p.jsonl",), calibration_share=1e-6))
        assert len(parts.train) == 5
        chosen |= {prompt.id for prompt in parts.calibration}
    assert len(chosen) == 1
    (tmp_path / "p.jsonl").write_text(rows[0])
    parts = prompt_parts(PromptsSection(path=(f"{tmp_path}/p.jsonl",), calibration_share=1e-6))
    assert (len(parts.train), parts.calibration) == (1, ())


def test_evaluation_takes_the_turns_of_the_mt_bench_shape(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"question_id": 81, "category": "writing", "turns": ["one", "two"]}\n')
    (prompt,) = evaluation_prompts(EvaluateSection(path=(str(file),)))
    assert (prompt.id, prompt.source, prompt.category, prompt.turns) == ("81", "q", "writing", ("one", "two"))
    (prompt,) = evaluation_prompts(EvaluateSection(path=(str(file),), max_turns=1))
    assert prompt.turns == ("one",)


@pytest.mark.parametrize("section", ["prompts", "evaluate"])
def test_sources_are_absolute_paths_and_uris_one_or_several(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    load, path_of = partial(load_config, None), attrgetter(f"{section}.path")
    assert path_of(load([f"{section}.path=p.jsonl"])) == (f"{tmp_path}/p.jsonl",)
    several = load([f"{section}.path=[s3://bucket/p/*.parquet, data/*.jsonl]"])
    assert path_of(several) == ("s3://bucket/p/*.parquet", f"{tmp_path}/data/*.jsonl")
    assert load_config(_dumped(several, tmp_path / "c.yaml")) == several
    for nothing in ("[]", "''"):
        with pytest.raises(ConfigError, match=rf"{section}\.path"):
            load([f"{section}.path={nothing}"])


def test_evaluation_reads_a_uri_as_it_reads_the_path(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    by_path, by_uri = (
        evaluation_prompts(load_config(None, [f"evaluate.path={source}"]).evaluate)
        for source in (f"{tmp_path}/q.jsonl", f"file://{tmp_path}/*.jsonl")
    )
    assert [prompt.turns for prompt in by_uri] == [("one",), ("two",)]
    assert by_uri == by_path


def _dumped(config: Config, file: Path) -> Path:
    file.write_text(dump_config(config))
    return file


def test_self_written_prompts_stand_alone_or_behind_those_of_the_files(tmp_path: Path) -> None:
    own = [Prompt(id=f"self-{i}", source="self", turns=(f"written {i}",)) for i in range(8)]
    alone = prompt_parts(PromptsSection(calibration_share=0.0), own)
    assert (alone.train, alone.calibration) == (tuple(own), ())
    (tmp_path / "p.jsonl").write_text('{"id": "file", "prompt": "given"}\n')
    both = prompt_parts(PromptsSection(path=(f"{tmp_path}/p.jsonl",), calibration_share=0.0), own)
    assert [prompt.id for prompt in both.train] == ["file", *(prompt.id for prompt in own)]
    assert prompt_parts(PromptsSection()).train == tuple(builtin_prompts("train"))


def test_shares_are_uniform_and_differ_by_purpose() -> None:
    shares = [share_of(str(i), "a") for i in range(1000)]
    assert all(0 <= share < 1 for share in shares)
    assert abs(sum(shares) / 1000 - 0.5) < 0.05
    assert shares[0] != share_of("0", "b")
