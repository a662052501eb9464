"""The backbone answers prompts, and writes some itself, as fast as one decoder can: into Parquet.

Knows words and files; knows no heads. In bfloat16 a near-tie may fall otherwise than decoded alone, so an answer is what
the backbone says within its own rounding.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import count, islice, repeat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.gpu.pool import Tell, complete
from medusa.config import SamplingParams
from medusa.decoder import Decoder

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
    ]
)
EncodedPrompt = tuple[str, str, list[int]]  # id, source, tokens
SELF_PROMPTED = "self-prompted"
_MARK = "\u2402user\u2403"  # stands where the user's turn will be; no template knows it
OWN_TEMPERATURE = 0.9
ROWS_A_FILE = 4096
_MIN_CHARACTERS = 12
_WORDS_THAT_TELL = 8  # turns that begin with the same words count as one


def open_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The chat template up to where the user's words would begin."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    assert isinstance(text, str)
    return list(tokenizer(text.partition(_MARK)[0], add_special_tokens=False)["input_ids"])


def own_prompts(
    decoder: Decoder, *, max_tokens: int, until: float, seed: int = 0, tell: Tell | None = None
) -> Iterator[tuple[str, str]]:
    """(id, words) of user turns that the backbone writes itself until `until` (monotonic seconds), no two beginning alike.

    After Magpie (arXiv 2406.08464). Turns that do not end, or say next to nothing, are dropped.
    """
    backbone = decoder.backbone
    params = SamplingParams(max_tokens=max_tokens, temperature=OWN_TEMPERATURE, acceptance="rejection", seed=seed)
    known: set[tuple[str, ...]] = set()
    for turn in complete(decoder, repeat(open_turn(backbone.tokenizer)), params, until=until, tell=tell):
        if turn.token_ids[-1] not in backbone.eos_token_ids:
            continue
        text = str(backbone.tokenizer.decode(turn.token_ids, skip_special_tokens=True)).strip()
        beginning = tuple(text.lower().split()[:_WORDS_THAT_TELL])
        if len(text) >= _MIN_CHARACTERS and beginning not in known:
            known.add(beginning)
            yield f"self-{len(known)}", text


def asked_prompts(file: Path) -> list[tuple[str, str, str]]:
    """(id, source, first user turn) of a JSONL file of `messages`, as in the data's README."""
    with file.open(encoding="utf-8") as lines:  # not splitlines: it also breaks at separators inside a text
        rows = [json.loads(line) for line in lines if line.strip()]
    return [
        (
            str(row["id"]),
            str(row.get("source", file.stem)),
            next(m["content"] for m in row["messages"] if m["role"] == "user"),
        )
        for row in rows
    ]


def answer(
    decoder: Decoder,
    asked: Iterable[tuple[str, str, str]],
    folder: Path,
    *,
    max_prompt: int,
    max_tokens: int,
    until: float,
    rows_a_file: int = ROWS_A_FILE,
    tell: Tell | None = None,
) -> int:
    """Answer (id, source, words) greedily until `until`, a Parquet file for each `rows_a_file`; how many tokens that were.

    Prompts of like length run together, so that little is padding. Prompts above `max_prompt` tokens are left out, and so
    is what is unfinished at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = _waves(_encoded(decoder.backbone.tokenizer, list(asked), max_prompt), decoder.num_slots)
    params = SamplingParams(max_tokens=max_tokens)
    answers = complete(decoder, (ids for _, _, ids in rows), params, until=until, tell=tell)
    total = 0
    for number in count():
        records = [
            {
                "id": rows[a.number][0],
                "source": rows[a.number][1],
                "prompt_ids": a.prompt_ids,
                "response_ids": a.token_ids,
            }
            for a in islice(answers, rows_a_file)
        ]
        if not records:
            break
        total += sum(len(record["response_ids"]) for record in records)
        pq.write_table(pa.Table.from_pylist(records, schema=SCHEMA), folder / f"answers-{number:04}.parquet")
    return total


def _encoded(
    tokenizer: PreTrainedTokenizerBase, asked: list[tuple[str, str, str]], max_prompt: int
) -> list[EncodedPrompt]:
    """All prompts at once, since the tokenizer then uses every core; those that are too long are left out."""
    if not asked:
        return []
    turns = [[{"role": "user", "content": words}] for _, _, words in asked]
    chats = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(chats, add_special_tokens=False)["input_ids"]
    return [
        (name, source, ids) for (name, source, _), ids in zip(asked, encoded, strict=True) if len(ids) <= max_prompt
    ]


def _waves(prompts: list[EncodedPrompt], size: int) -> list[EncodedPrompt]:
    """Runs of `size` prompts of like length, the runs in a fixed random order: any beginning is a fair sample."""
    prompts = sorted(prompts, key=lambda prompt: len(prompt[2]))
    starts = range(0, len(prompts), size)
    order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(0)).tolist()
    return [prompt for run in order for prompt in prompts[starts[run] : starts[run] + size]]
