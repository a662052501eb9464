"""Every format and every place gives the same records; what is damaged or missing is named."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa.errors import PromptError
from pipelines.errors import ConfigError
from pipelines.prompt_files import _lines, find_files
from pipelines.prompts import read_prompts

ROWS: list[dict[str, Any]] = [{"id": str(i), "source": "x", "turns": [f"p{i}", "more"]} for i in range(6)]
Write = Callable[[Path, list[dict[str, Any]]], None]


def _jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _array(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("\n " + json.dumps(rows, indent=1))


def _gzip(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def _marked(write: Write) -> Write:
    """As Windows' editors save a file: behind a byte order mark."""

    def write_marked(file: Path, rows: list[dict[str, Any]]) -> None:
        write(file, rows)
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())

    return write_marked


def _parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)


def _arrow_stream(file: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    with file.open("wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def _arrow_file(file: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    with file.open("wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def _saved_to_disk(folder: Path, rows: list[dict[str, Any]], shards: int = 2) -> None:
    """What `datasets.Dataset.save_to_disk` leaves."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    size = len(rows) // shards
    for i, name in enumerate(names):
        _arrow_stream(folder / name, rows[i * size : (i + 1) * size])
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    _arrow_stream(folder / "cache-0123.arrow", [{"prompt": "left by map()"}])


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("p.jsonl", _jsonl),
        ("p.json", _jsonl),
        ("p.json", _array),
        ("p.jsonl", _marked(_jsonl)),
        ("p.json", _marked(_array)),
        ("p.jsonl.gz", _gzip),
        ("p.parquet", _parquet),
        ("p.arrow", _arrow_stream),
        ("p.arrow", _arrow_file),
    ],
)
def test_every_format_holds_the_same_prompts(name: str, write: Write, tmp_path: Path) -> None:
    write(tmp_path / name, ROWS)
    _jsonl(tmp_path / "reference.jsonl", ROWS)
    prompts = read_prompts(tmp_path / name)
    assert prompts == read_prompts(tmp_path / "reference.jsonl")
    assert [prompt.id for prompt in prompts] == [row["id"] for row in ROWS]


def test_a_folder_that_datasets_saved_is_read_as_it_lists_its_shards(tmp_path: Path) -> None:
    _saved_to_disk(tmp_path / "one", ROWS)
    assert [p.id for p in read_prompts(tmp_path / "one")] == [row["id"] for row in ROWS]
    _saved_to_disk(tmp_path / "dict" / "train", ROWS[:4])
    _saved_to_disk(tmp_path / "dict" / "test", ROWS[4:])
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert read_prompts(tmp_path / "dict") == read_prompts(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"state\.json does not list the data set's data_files"):
        read_prompts(tmp_path / "one")


def test_a_folder_of_shards_is_read_whole_without_what_is_hidden(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / ".cache").mkdir()
    _parquet(tmp_path / "data" / "train-00000-of-00002.parquet", ROWS[:3])
    _jsonl(tmp_path / "data" / "train-00001-of-00002.jsonl", ROWS[3:])
    _jsonl(tmp_path / ".cache" / "x.jsonl", [{"prompt": "hidden"}])
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "dataset_infos.json").write_text('{"prompt": "not one"}')
    assert [p.id for p in read_prompts(tmp_path)] == [row["id"] for row in ROWS]


def test_globs_and_lists_take_their_files_in_order_and_each_once(tmp_path: Path) -> None:
    for i, folder in enumerate(("a", "b/c", "b/d")):
        (tmp_path / folder).mkdir(parents=True)
        _jsonl(tmp_path / folder / f"part{i}.jsonl", ROWS[2 * i : 2 * i + 2])
    (tmp_path / "b" / "note.txt").write_text("no prompts")
    expected = {"*/*.jsonl": "01", "b/?/part[12].*": "2345", "**/*.jsonl": "012345", "b*": "2345"}
    for pattern, ids in expected.items():
        assert "".join(p.id for p in read_prompts(f"{tmp_path}/{pattern}")) == ids
    assert [p.id for p in read_prompts([f"{tmp_path}/b", f"{tmp_path}/a", f"{tmp_path}/b"])] == list("234501")


def test_a_name_with_a_bracket_is_a_name_where_there_is_such_a_file(tmp_path: Path) -> None:
    _jsonl(tmp_path / "p[1].jsonl", ROWS)
    assert len(read_prompts(tmp_path / "p[1].jsonl")) == len(ROWS)


def test_a_uri_is_read_through_its_filesystem_and_named_as_the_user_wrote_it(tmp_path: Path) -> None:
    _jsonl(tmp_path / "p.jsonl", [*ROWS, {"nothing": 1}])
    told: list[str] = []
    for uri in (f"file://{tmp_path}/p.jsonl", f"file://{tmp_path}/*.jsonl", f"file://{tmp_path}"):
        assert [p.id for p in read_prompts(uri, report=told.append)] == [row["id"] for row in ROWS]
    assert {message.partition(" is left out: ")[0] for message in told} == {f"file://{tmp_path}/p.jsonl:7"}


def test_another_filesystem_needs_nothing_of_the_local_one(tmp_path: Path) -> None:
    (tmp_path / "bucket" / "set").mkdir(parents=True)
    _parquet(tmp_path / "bucket" / "set" / "0.parquet", ROWS[:3])
    _saved_to_disk(tmp_path / "bucket" / "saved", ROWS)
    bucket = pafs.SubTreeFileSystem(str(tmp_path / "bucket"), pafs.LocalFileSystem())
    for source, expected in (("set/*.parquet", 3), ("set", 3), ("saved", 6), ("set/0.parquet", 3)):
        files = find_files(source, bucket)
        assert sum(1 for file in files for _ in file.records()) == expected


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("nowhere.jsonl", r"nowhere\.jsonl: nothing is there"),
        ("*.parquet", r"\*\.parquet: nothing is there"),
        ("texts", r"texts: nothing there is \.jsonl"),
    ],
)
def test_what_is_not_there_is_named(source: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=told):
        read_prompts(tmp_path / source)


def test_an_unknown_scheme_is_told_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"ftp://host/p\.jsonl cannot be opened.*known are s3://"):
        read_prompts("ftp://host/p.jsonl")
    with pytest.raises(ConfigError, match="names no bucket"):
        read_prompts("s3://*/p.jsonl")


@pytest.mark.parametrize(
    "source",
    [
        "ftp://me:SECRET@host/p.jsonl",
        "ftp://me:SEC/SECRET@host/" + 200 * "p",
        "s3://key:SECRET@*/p.jsonl",
        "file://me:SECRET@/nowhere/p.jsonl",
        "s3://key:SECRET@no bucket/p.jsonl",
    ],
)
def test_a_source_is_told_of_without_its_password(source: str) -> None:
    with pytest.raises(ConfigError, match=r"\*\*\*@") as caught:
        read_prompts(source)
    assert "SECRET" not in str(caught.value)


def test_a_source_without_a_prompt_is_told_of_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.jsonl").write_text('{"nothing": 1}\n')
    found = find_files(str(tmp_path / "p.jsonl"))
    monkeypatch.setattr("pipelines.prompts.find_files", lambda source: found)
    with pytest.raises(PromptError, match=r"s3://\*\*\*@bucket/p\.jsonl holds no prompt") as caught:
        read_prompts("s3://key:SECRET@bucket/p.jsonl")
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(("name", "kind"), [("x.parquet", "Parquet"), ("x.arrow", "Arrow"), ("x.jsonl.gz", "JSONL")])
@pytest.mark.parametrize("damage", ["garbage", "cut off"])
def test_a_damaged_file_is_one_line_with_its_name(name: str, kind: str, damage: str, tmp_path: Path) -> None:
    write: dict[str, Write] = {"Parquet": _parquet, "Arrow": _arrow_file, "JSONL": _gzip}
    write[kind](tmp_path / name, ROWS)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(b"not what it says" * 9 if damage == "garbage" else whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=rf"{name}.* is not a {kind} file") as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_parquet_page_that_was_overwritten_is_found_while_reading(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": [f"prompt {i}" * 50 for i in range(100)]}), file, compression="gzip")
    whole = bytearray(file.read_bytes())
    whole[100:400] = bytes(300)
    file.write_bytes(whole)
    with pytest.raises(ConfigError, match=r"x\.parquet is not a Parquet file"):
        read_prompts(file)


@pytest.mark.parametrize(("name", "kind"), [("x.parquet", "Parquet"), ("x.arrow", "Arrow")])
@pytest.mark.parametrize(
    ("column", "told"),
    [
        (pa.array([b"\xff\xfe no text"], pa.binary()).view(pa.string()), "utf-8"),
        (pa.array([2**62], pa.timestamp("us")), "date value out of range"),
    ],
    ids=["no UTF-8", "no date"],
)
def test_a_value_that_python_cannot_hold_is_told_with_the_files_name(
    name: str, kind: str, column: pa.Array, told: str, tmp_path: Path
) -> None:
    table = pa.table({"prompt": column})
    if kind == "Parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_stream(str(tmp_path / name), table.schema) as stream:
            stream.write_table(table)
    with pytest.raises(ConfigError, match=rf"{name} is not a {kind} file that can be read: .*{told}"):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("what", ['{"prompt": ', "9" * 5000, "[" * 10**5 + "]" * 10**5])
def test_an_array_that_cannot_be_read_is_one_line_with_its_name(what: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(f'[{{"prompt": "a"}}, {what}]')
    with pytest.raises(ConfigError, match=r"p\.json begins as a JSON array and cannot be read as one: .+") as caught:
        read_prompts(tmp_path / "p.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [_jsonl, _parquet])
def test_an_unknown_shape_names_the_keys_it_saw(write: Write, tmp_path: Path) -> None:
    file = tmp_path / ("p.parquet" if write is _parquet else "p.jsonl")
    write(file, [{"utterance": "a", "speaker": "b"}])
    with pytest.raises(PromptError, match=r"\['speaker', 'utterance'\]"):
        read_prompts(file, report=lambda _: None)


def test_of_many_bad_lines_the_first_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine"}\n' + "{\n" * 30)
    told: list[str] = []
    assert len(read_prompts(file, report=told.append)) == 1
    assert (len(told), told[-1]) == (21, "10 more records are no prompts and left out")


class _Pieces(io.BytesIO):
    """A stream that gives `size` bytes at a time, as a remote one may."""

    def __init__(self, data: bytes, size: int) -> None:
        super().__init__(data)
        self._size = size

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(self._size)


@given(st.lists(st.sampled_from([b"\n", b"a", b"bc", b"\r", "é".encode()])).map(b"".join), st.integers(1, 9))
def test_lines_are_those_of_the_whole_text_wherever_a_stream_is_cut(text: bytes, size: int) -> None:
    assert list(_lines(_Pieces(text, size))) == list(io.BytesIO(text))


def test_one_long_line_takes_no_longer_than_as_much_text_in_short_ones() -> None:
    def seconds(line: bytes) -> float:
        stream = _Pieces(line * (2**22 // len(line)), 2**11)
        began = time.process_time()
        assert sum(map(len, _lines(stream))) == 2**22
        return time.process_time() - began

    assert seconds(b"x" * 2**22) < 10 * seconds(b"x" * 63 + b"\n")
