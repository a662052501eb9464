"""What passes between distillation and training, declared once: the Arrow schema of an answer. Knows Arrow and files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import DistillSection
from pipelines.errors import StageError
from pipelines.folder_lock import settled

TRAIN, CALIBRATION, UNUSED = "train", "calibration", "unused"  # UNUSED: nobody asks for its prompt any more

# One answered (or failed) turn. Turn n of prompt p has the id "p" for n = 1, else "p/n".
ANSWERS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("part", pa.string(), nullable=False),  # as the last distillation asked: see `align`
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),  # the chat so far, through the open answer
        pa.field("response_ids", pa.list_(pa.int32()), nullable=False),  # end of sequence included, where it came
        pa.field("response", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string()),  # "stop", "length"; null where the turn failed
        pa.field("sampling", pa.string(), nullable=False),  # see sampling_key
        pa.field("temperature", pa.float64()),  # what this row was sampled with: its prompt's own, or the configured
        pa.field("top_p", pa.float64()),
        pa.field("seed", pa.int64()),  # of the row, made from the configured seed and its id
        pa.field("backbone", pa.string(), nullable=False),  # fingerprint
        pa.field("error", pa.string()),  # null where the turn was answered
        pa.field("asked", pa.string()),  # digest of the prompt; no such column in files of earlier releases
    ]
)

# What training needs.
_READ = ("id", "prompt_id", "part", "prompt_ids", "response_ids", "sampling", "backbone", "error")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answered turn, as token ids."""

    id: str
    prompt_id: str
    prompt_ids: list[int]
    response_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers of one part, in the order of their ids, and where they come from."""

    rows: tuple[Answer, ...]
    backbone: str
    sampling: str
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        return sum(len(row.response_ids) for row in self.rows)


def sampling_key(config: DistillSection, dtype: str) -> str:
    """The settings that an answer depends on, and the type in which the backbone decodes it, as one string."""
    settings = config.model_dump(include={"max_tokens", "temperature", "top_p", "seed"})
    return json.dumps(settings | {"dtype": dtype}, sort_keys=True)


def same_sampling(made: str, asked: str) -> bool:
    """Are answers of the key `made` those that `asked` is for? Keys of earlier releases name no dtype: any will do."""
    wanted = json.loads(asked)
    return bool({"dtype": wanted["dtype"]} | json.loads(made) == wanted)


def answer_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def scan(folder: Path, columns: Iterable[str] | None = None) -> Iterator[dict[str, Any]]:
    """Every row of a folder of answers, `columns` only. Raises StageError for a file that is not one of ours."""
    names = list(columns) if columns is not None else ANSWERS.names
    for file in answer_files(folder):
        yield from _rows_of(file, names)


def _rows_of(file: Path, names: list[str]) -> list[dict[str, Any]]:
    try:
        if "asked" in names and "asked" not in pq.read_schema(file).names:
            return [row | {"asked": None} for row in _rows_of(file, [name for name in names if name != "asked"])]
        return pq.read_table(file, columns=names).to_pylist()
    except (pa.ArrowException, KeyError, OSError, UnicodeDecodeError) as error:  # the last two: damaged inside
        reason = " ".join(str(error).split())
        raise StageError(f"{file} is not a file of distilled answers that can be read: {reason:.200}") from None


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Ids of the prompts whose answers went, and whether anything went or moved to another part."""

    edited: set[str]
    changed: bool


def align(folder: Path, wanted: Mapping[str, tuple[str, str]]) -> Alignment:
    """Make what is there answer what is `wanted` now: prompt id → (digest of the prompt, part).

    Answers to a prompt that was edited go, to be asked for again. Those of a prompt that nobody asks for any more stay, as
    UNUSED, for the day on which it comes back. Each file is rewritten whole or not at all.
    """
    edited, changed = set(), False
    for file in answer_files(folder):
        rows = _rows_of(file, ["prompt_id", "part", "asked"])
        parts: dict[int, str] = {}
        for index, row in enumerate(rows):
            digest, part = wanted.get(row["prompt_id"], (row["asked"], UNUSED))
            if row["asked"] in (None, digest):
                parts[index] = part
            else:
                edited.add(row["prompt_id"])
        if [row["part"] for row in rows] != list(parts.values()):
            _rewrite(file, parts)
            changed = True
    return Alignment(edited=edited, changed=changed)


def _rewrite(file: Path, parts: Mapping[int, str]) -> None:
    """Keep these rows of a file, in these parts."""
    if not parts:
        file.unlink()
        return
    table = pq.read_table(file).take(list(parts))
    place = table.schema.get_field_index("part")
    rewritten = file.with_name(f".{file.name}.part")
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(parts.values(), pa.string())), rewritten)
    os.replace(rewritten, file)


def settled_answers(folder: Path, part: str) -> Answers:
    """`read_answers` while no distillation rewrites the folder. StageError where one is at work in it."""
    with settled(folder):
        return read_answers(folder, part)


def read_answers(folder: Path, part: str) -> Answers:
    """The answered turns of one part; a turn answered twice counts once, failed ones not at all.

    Raises StageError when there are none, or when they come from several backbones.
    """
    found = (row for row in scan(folder, _READ) if row["part"] == part and row["error"] is None)
    rows = {(row["id"], row["prompt_id"]): row for row in found}  # "p/2" may be a turn of "p", or a prompt
    if not rows:
        purpose, share = "to train on", ""
        if part == CALIBRATION:
            purpose, share = "for calibration", ", with prompts.calibration_share above 0 and two prompts or more"
        raise StageError(f"no answers {purpose} in {folder}; run `distill` first{share}")
    ordered = [rows[key] for key in sorted(rows)]
    backbones = sorted({row["backbone"] for row in ordered})
    if len(backbones) > 1:
        raise StageError(
            f"{folder} holds answers of {len(backbones)} backbones ({', '.join(backbones)}); use one workdir for each"
        )
    digest = hashlib.sha256()
    for row in ordered:
        digest.update(json.dumps([row["id"], row["prompt_ids"], row["response_ids"]]).encode())
    kept = tuple(Answer(**{name: row[name] for name in Answer.__dataclass_fields__}) for row in ordered)
    return Answers(
        rows=kept, backbone=backbones[0], sampling=ordered[0]["sampling"], fingerprint=digest.hexdigest()[:16]
    )
