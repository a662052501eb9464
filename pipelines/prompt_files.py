"""Records of files, local or remote, in the formats that prompts come in. Knows pyarrow; knows no prompt.

A source is a file, a glob, or a folder, below a local path or a URI that pyarrow knows (s3://, gs://, hdfs://, file://).
    .jsonl .json .ndjson    an object per line, or one array of objects; also as .gz, .bz2, .zst
    .parquet
    .arrow                  what Hugging Face `datasets` saves: an IPC stream, or an IPC file
A folder is what `save_to_disk` leaves (state.json or dataset_dict.json), or holds shards of these formats at any depth.
"""

from __future__ import annotations

import codecs
import fnmatch
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.credentials import one_line, without_credentials
from pipelines.errors import ConfigError

# Reads one record when called; ValueError where it cannot be read, RecursionError where it is nested too deeply.
Record = Callable[[], Mapping[str, Any]]

_JSON, _COMPRESSED = (".jsonl", ".ndjson", ".json"), (".gz", ".bz2", ".zst")
_WILD = re.compile(r"[*?\[]")
_ROWS_AT_ONCE = 1024
# What a damaged table raises; the last two, values that Python cannot hold.
_UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError)
# What lies beside the shards of a Hugging Face folder and tells of them.
_METADATA = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """One file: where it lies, and the name by which the user knows it."""

    filesystem: pafs.FileSystem
    path: str
    name: str

    @property
    def stem(self) -> str:
        return PurePosixPath(self.path).name.partition(".")[0]

    def records(self) -> Iterator[tuple[int, Record]]:
        """(line or row, counted from 1; its record). Raises ConfigError, naming the file, where it is damaged."""
        format_of = {".parquet": self._parquet, ".arrow": self._arrow}
        return format_of.get(_suffix(self.path), self._json)()

    def _json(self) -> Iterator[tuple[int, Record]]:
        try:
            with self.filesystem.open_input_stream(self.path) as stream:
                head, lines = _peek(line.removeprefix(codecs.BOM_UTF8) for line in _lines(stream))
                if head.lstrip().startswith(b"["):
                    yield from self._json_array(b"".join(lines))
                    return
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield number, partial(_json_object, line)
        except OSError as error:
            raise self._damaged(error) from None

    def _json_array(self, text: bytes) -> Iterator[tuple[int, Record]]:
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self.name} begins as a JSON array and cannot be read as one: {error}") from None
        for number, row in enumerate(rows, start=1):
            yield number, partial(_object, row)

    def _parquet(self) -> Iterator[tuple[int, Record]]:
        try:
            with self.filesystem.open_input_file(self.path) as source:
                yield from _rows(pq.ParquetFile(source).iter_batches(_ROWS_AT_ONCE))
        except _UNREADABLE as error:
            raise self._damaged(error) from None

    def _arrow(self) -> Iterator[tuple[int, Record]]:
        try:
            with self.filesystem.open_input_file(self.path) as source:
                is_file = source.read(6) == b"ARROW1"
                source.seek(0)
                if is_file:
                    reader = pa.ipc.open_file(source)
                    batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
                    yield from _rows(batches)
                else:
                    yield from _rows(pa.ipc.open_stream(source))
        except _UNREADABLE as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> ConfigError:
        kind = {".parquet": "Parquet", ".arrow": "Arrow"}.get(_suffix(self.path), "JSONL")
        return ConfigError(f"{self.name} is not a {kind} file that can be read: {one_line(error)}")


def find_files(source: str, filesystem: pafs.FileSystem | None = None) -> list[PromptFile]:
    """The files of one source, in order of their paths. `filesystem` is for a path that stands within one already.

    Raises ConfigError, which tells no password of a URI, where there is no file, or none of a known format.
    """
    shown = without_credentials(source)
    root, wild, pattern = _split(source)
    given = filesystem is not None
    if filesystem is None:
        filesystem, path = _filesystem(root, shown)
    else:
        path = root
    prefix = "" if given or "://" not in source else source.partition("://")[0] + "://"

    def named(path: str) -> PromptFile:
        return PromptFile(filesystem=filesystem, path=path, name=f"{prefix}{path}")

    try:
        if wild and filesystem.get_file_info(source if given else _join(path, pattern)).type != pafs.FileType.NotFound:
            path, wild = _join(path, pattern), False  # a name that holds a bracket, not a pattern
        if wild:
            found = list(_expand(filesystem, path, pattern.split("/")))
        else:
            found = [path] if filesystem.get_file_info(path).type != pafs.FileType.NotFound else []
        paths = list(itertools.chain.from_iterable(_open_folder(filesystem, one) for one in sorted(found)))
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{shown} cannot be listed: {one_line(error)}") from None
    if not paths:
        what = "nothing there is .jsonl, .json, .parquet or .arrow" if found else "nothing is there"
        raise ConfigError(f"no prompts file at {shown}: {what}; give a file, a folder or a glob, or null for ours")
    return [named(path) for path in dict.fromkeys(paths)]


def _split(source: str) -> tuple[str, bool, str]:
    """(the part before the first wildcard's path segment, is there one?, the pattern below it)."""
    match = _WILD.search(source)
    if match is None:
        return source, False, ""
    cut = source.rfind("/", 0, match.start())
    return source[: max(cut, 0)] or ("/" if cut == 0 else "."), True, source[cut + 1 :]


def _filesystem(root: str, shown: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in root:
        if "://" in shown:
            raise ConfigError(f"{shown} names no bucket before its first wildcard; write one")
        return pafs.LocalFileSystem(), str(Path(root).expanduser().absolute())
    try:
        filesystem, path = pafs.FileSystem.from_uri(root)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(
            f"{shown} cannot be opened: {one_line(error)} (known are s3://, gs://, hdfs://, file://)"
        ) from None
    return filesystem, path


def _expand(filesystem: pafs.FileSystem, base: str, segments: list[str]) -> Iterator[str]:
    """Paths below `base` that match a pattern, segment by segment; `**` is any number of folders."""
    head, *rest = segments
    if head == "**":
        yield from _expand(filesystem, base, rest or ["*"])
        for info in _listed(filesystem, base):
            if info.type == pafs.FileType.Directory:
                yield from _expand(filesystem, info.path, segments)
        return
    for info in _listed(filesystem, base):
        if not fnmatch.fnmatchcase(info.base_name, head) or (info.base_name[:1] == "." and head[:1] != "."):
            continue
        if not rest:
            yield info.path
        elif info.type == pafs.FileType.Directory:
            yield from _expand(filesystem, info.path, rest)


def _open_folder(filesystem: pafs.FileSystem, path: str) -> list[str]:
    """A file as it is; of a folder, the files that a Hugging Face data set lists, or all shards below it."""
    if filesystem.get_file_info(path).type != pafs.FileType.Directory:
        return [path]
    if (splits := _metadata(filesystem, _join(path, "dataset_dict.json"), "splits")) is not None:
        return [file for split in splits for file in _open_folder(filesystem, _join(path, str(split)))]
    if (shards := _metadata(filesystem, _join(path, "state.json"), "_data_files")) is not None:
        return [_join(path, str(shard["filename"])) for shard in shards]
    below = [info.path for info in _listed(filesystem, path, recursive=True) if info.type == pafs.FileType.File]
    return sorted(file for file in below if _is_shard(file, path))


def _is_shard(file: str, folder: str) -> bool:
    parts = PurePosixPath(file.removeprefix(folder)).parts
    hidden = any(part[0] in "._" for part in parts if part != "/")
    return not hidden and parts[-1] not in _METADATA and _suffix(file) in (*_JSON, ".parquet", ".arrow")


def _metadata(filesystem: pafs.FileSystem, path: str, key: str) -> list[Any] | None:
    if filesystem.get_file_info(path).type != pafs.FileType.File:
        return None
    with filesystem.open_input_stream(path) as stream:
        try:
            return list(json.loads(stream.read())[key])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} does not list the data set's {key.strip('_')}: {error!r:.100}") from None


def _listed(filesystem: pafs.FileSystem, folder: str, *, recursive: bool = False) -> list[pafs.FileInfo]:
    selector = pafs.FileSelector(folder, recursive=recursive, allow_not_found=True)
    return sorted(filesystem.get_file_info(selector), key=lambda info: info.path)


def _suffix(path: str) -> str:
    """The format's suffix, a compression's behind it left out."""
    name = PurePosixPath(path)
    return (PurePosixPath(name.stem) if name.suffix in _COMPRESSED else name).suffix


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def _lines(stream: Any) -> Iterator[bytes]:
    """Lines of a stream, holding no more than one of them and a chunk."""
    begun: list[bytes] = []  # a line so far; joined once, since it may be as long as the file
    while chunk := stream.read(1 << 20):
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            yield b"".join((*begun, end, b"\n"))
            begun = []
        begun.append(rest)
    if last := b"".join(begun):
        yield last


def _peek(lines: Iterator[bytes]) -> tuple[bytes, Iterable[bytes]]:
    """(the first line that is not blank, all lines)."""
    read: list[bytes] = []
    for line in lines:
        read.append(line)
        if line.strip():
            break
    return (read[-1] if read else b""), itertools.chain(read, lines)


def _rows(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[int, Record]]:
    rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
    for number, row in enumerate(rows, start=1):
        yield number, partial(_object, row)


def _json_object(line: bytes) -> Mapping[str, Any]:
    try:
        return _object(json.loads(line.decode(errors="replace")))
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None


def _object(record: Any) -> Mapping[str, Any]:
    if not isinstance(record, Mapping):
        raise ValueError(f"expected a JSON object, got a {type(record).__name__}")  # noqa: TRY004
    return record
