"""The backbone answers prompts, and writes some itself, in large batches through transformers' `generate`.

    B prompts of a batch
Knows tokens and files; knows no heads. Left padding is masked; in bfloat16 a near-tie may fall otherwise than decoded
alone, so an answer is what the backbone says within its own rounding.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
    ]
)
SELF_PROMPTED = "self-prompted"
_MARK = "\u2402user\u2403"  # stands where the user's turn will be; no template knows it
_MIN_CHARACTERS = 12
_WORDS_THAT_TELL = 8  # turns that begin with the same words count as one


@torch.inference_mode()
def complete(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, max_tokens: int, sample: bool = False
) -> list[list[int]]:
    """Continue each prompt, greedily or (`sample`) at temperature 1 within top-p 0.95; end of sequence included."""
    longest = max(map(len, prompts))
    ends = model.generation_config.eos_token_id
    end_ids = set(ends if isinstance(ends, list) else [ends])
    pad = next(iter(end_ids))
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=model.device)
    seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    how: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0} if sample else {}
    made = model.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=seen, max_new_tokens=max_tokens, pad_token_id=pad, **({"do_sample": False} | how)
    )
    return [_until_end(row, end_ids) for row in made[:, longest:].tolist()]


def _until_end(tokens: list[int], end_ids: set[int]) -> list[int]:
    for place, token in enumerate(tokens, start=1):
        if token in end_ids:
            return tokens[:place]
    return tokens


def open_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The chat template up to where the user's words would begin."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    assert isinstance(text, str)
    return list(tokenizer(text.partition(_MARK)[0], add_special_tokens=False)["input_ids"])


def own_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch: int, max_tokens: int, until: float
) -> Iterator[tuple[str, str]]:
    """(id, words) of user turns that the backbone writes itself until `until` (monotonic seconds), no two beginning alike.

    After Magpie (arXiv 2406.08464). Turns that do not end, or say next to nothing, are dropped.
    """
    start = open_turn(tokenizer)
    end_ids = {tokenizer.eos_token_id}
    known: set[tuple[str, ...]] = set()
    while time.monotonic() < until:
        for tokens in complete(model, [start] * batch, max_tokens=max_tokens, sample=True):
            text = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
            beginning = tuple(text.lower().split()[:_WORDS_THAT_TELL])
            if tokens[-1] in end_ids and len(text) >= _MIN_CHARACTERS and beginning not in known:
                known.add(beginning)
                yield f"self-{len(known)}", text


def asked_prompts(file: Path) -> list[tuple[str, str, str]]:
    """(id, source, first user turn) of a JSONL file of `messages`, as in the data's README."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [
        (
            str(row["id"]),
            str(row.get("source", file.stem)),
            next(m["content"] for m in row["messages"] if m["role"] == "user"),
        )
        for row in rows
    ]


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Iterable[tuple[str, str, str]],
    folder: Path,
    *,
    batch: int,
    max_prompt: int,
    max_tokens: int,
    until: float,
) -> int:
    """Answer (id, source, words) batch by batch until `until`, a Parquet file a batch; how many tokens were answered.

    Batches hold prompts of like length, so that little is padding. Prompts above `max_prompt` tokens are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    encoded = [(name, source, _encode(tokenizer, words)) for name, source, words in asked]
    fitting = sorted((row for row in encoded if len(row[2]) <= max_prompt), key=lambda row: len(row[2]))
    batches = [fitting[start : start + batch] for start in range(0, len(fitting), batch)]
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()  # any start is wide
    total = 0
    for number in order:
        if time.monotonic() >= until:
            break
        rows = batches[number]
        answers = complete(model, [ids for _, _, ids in rows], max_tokens=max_tokens)
        records = [
            {"id": name, "source": source, "prompt_ids": ids, "response_ids": said}
            for (name, source, ids), said in zip(rows, answers, strict=True)
        ]
        total += sum(map(len, answers))
        pq.write_table(pa.Table.from_pylist(records, schema=SCHEMA), folder / f"{rows[0][1]}-{number}.parquet")
    return total


def _encode(tokenizer: PreTrainedTokenizerBase, words: str) -> list[int]:
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(chat, str)
    return list(tokenizer(chat, add_special_tokens=False)["input_ids"])
