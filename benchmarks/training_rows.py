"""Rows of answers that training steps are measured on: from a Parquet file, or random. Knows ids; no model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from pipelines.dataset import length_of, num_positions
from pipelines.records import Answer

PROMPT_LENGTHS, ANSWER_LENGTHS = (32, 128), (16, 256)  # of random rows, uniform


def read_rows(file: Path, *, vocab_size: int) -> list[Answer]:
    """Rows of a Parquet file with columns prompt_ids and response_ids that have a label position for the heads.

    ValueError for ids that are no tokens of the vocabulary.
    """
    table = pq.read_table(file, columns=["prompt_ids", "response_ids"]).to_pylist()
    rows = [Answer(id=str(n), prompt_id=str(n), **row) for n, row in enumerate(table)]
    largest = max((max(row.prompt_ids + row.response_ids, default=0) for row in rows), default=0)
    if largest >= vocab_size:
        raise ValueError(
            f"{file} holds token {largest}, the backbone knows {vocab_size}: it was written by another one"
        )
    return [row for row in rows if num_positions(row)]


def random_rows(count: int, *, vocab_size: int, seed: int) -> list[Answer]:
    rng = random.Random(seed)

    def ids(lengths: tuple[int, int]) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(rng.randint(*lengths))]

    return [
        Answer(id=str(n), prompt_id=str(n), prompt_ids=ids(PROMPT_LENGTHS), response_ids=ids(ANSWER_LENGTHS))
        for n in range(count)
    ]


def draw_batches(rows: Sequence[Answer], *, rows_of_step: int, num_batches: int, seed: int) -> list[list[Answer]]:
    """Batches of different rows, drawn at random. ValueError where there are too few."""
    needed = rows_of_step * num_batches
    if len(rows) < needed:
        raise ValueError(f"{num_batches} batches of {rows_of_step} rows need {needed}, there are {len(rows)}")
    drawn = random.Random(seed).sample(list(rows), needed)
    return [drawn[start : start + rows_of_step] for start in range(0, needed, rows_of_step)]


def num_labels(method: str, batch: Sequence[Answer]) -> int:
    """Label positions of a step: where the first head has a target, or for MEDUSA-2 the backbone itself."""
    return sum(num_positions(row) if method == "medusa1" else len(row.response_ids) for row in batch)


def padding_share(batches: Sequence[Sequence[Answer]]) -> float:
    """How much of batches padded to their longest rows is padding."""
    cells = sum(len(batch) * max(map(length_of, batch)) for batch in batches)
    return 1 - sum(length_of(row) for batch in batches for row in batch) / cells
