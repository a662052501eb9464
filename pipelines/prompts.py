"""Prompts of any common shape, and the built-in ones. Knows text and files; knows no tokens, no model, no Ray.

Shapes of a JSONL line or Parquet row, the first that fits:
    messages       OpenAI chat      [{"role": "user", "content": …}, …]
    conversations  ShareGPT         [{"from": "human", "value": …}, …]
    turns          MT-Bench         ["first question", "second question"]
    instruction    Alpaca           with an optional "input"
    prompt | text | question        plain text
Only what the user said (and a system message) is kept: the backbone writes the answers itself, turn by turn.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from medusa.errors import PromptError
from pipelines.builtin_prompts import BUILTIN, NUM_CALIBRATION, NUM_TRAIN
from pipelines.config import EvaluateSection, PromptsSection
from pipelines.errors import ConfigError

logger = logging.getLogger(__name__)

_USER, _SYSTEM = {"user", "human", "prompter"}, {"system"}
_PLAIN = ("prompt", "text", "question")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One conversation's user side: `turns` in order, none empty. `id` is unique among the prompts read together."""

    id: str
    source: str
    turns: tuple[str, ...]
    system: str | None = None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Disjoint prompts for the heads and for the tree."""

    train: tuple[Prompt, ...]
    calibration: tuple[Prompt, ...]


def prompt_parts(config: PromptsSection) -> Parts:
    """The prompts that distillation answers, cut to the configured limits. Raises ConfigError, PromptError."""
    if config.path is None:
        train, calibration = builtin_prompts("train"), builtin_prompts("calibration")
    else:
        prompts = read_prompts(config.path)
        calibration = [prompt for prompt in prompts if share_of(prompt.id, "calibration") < config.calibration_share]
        chosen = {prompt.id for prompt in calibration}
        train = [prompt for prompt in prompts if prompt.id not in chosen]
    cut = [_cut(part, config.max_turns) for part in (train[: config.limit], calibration[: config.calibration_limit])]
    return Parts(train=cut[0], calibration=cut[1])


def evaluation_prompts(config: EvaluateSection) -> tuple[Prompt, ...]:
    """The turns that evaluation decodes. Raises ConfigError, PromptError."""
    prompts = builtin_prompts("evaluation") if config.path is None else read_prompts(config.path)
    return _cut(prompts[: config.num_prompts], config.max_turns)


def builtin_prompts(part: str) -> list[Prompt]:
    """The built-in prompts of "train", "calibration" or "evaluation", kinds taking turns so that any start is wide."""
    bounds = {
        "train": (0, NUM_TRAIN),
        "calibration": (NUM_TRAIN, NUM_TRAIN + NUM_CALIBRATION),
        "evaluation": (NUM_TRAIN + NUM_CALIBRATION, None),
    }
    start, stop = bounds[part]
    columns = [[(kind, row) for row in range(len(texts))[start:stop]] for kind, texts in BUILTIN.items()]
    return [
        Prompt(id=f"builtin-{kind}-{row}", source=f"builtin/{kind}", turns=(BUILTIN[kind][row],))
        for round_of_kinds in zip(*columns, strict=True)
        for kind, row in round_of_kinds
    ]


def read_prompts(path: Path, *, report: Callable[[str], None] = logger.warning) -> list[Prompt]:
    """Every prompt of a JSONL or Parquet file, in its order; equal ones once.

    A row that cannot be read is handed to `report` as "file:line: why" and the others go on. Raises ConfigError when
    the file is missing or of another kind, PromptError when nothing in it is a prompt.
    """
    if not path.is_file():
        raise ConfigError(f"no prompts file at {path}; give a JSONL or Parquet file, or null for the built-in prompts")
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)
    prompts: dict[str, Prompt] = {}
    for number, read in rows:
        try:
            prompt = parse_prompt(read(), source=path.stem)
        except ValueError as error:
            report(f"{path}:{number}: {error}")
            continue
        known = prompts.get(prompt.id)
        if known is not None and known != prompt:
            prompt = replace(prompt, id=f"{prompt.id}-{_digest(prompt)[:8]}")
        prompts[prompt.id] = prompt
    if not prompts:
        raise PromptError(f"{path} holds no prompt; each line must be JSON with messages, turns, instruction or prompt")
    return list(prompts.values())


def parse_prompt(row: Mapping[str, Any], *, source: str) -> Prompt:
    """One record of any shape above. ValueError says what is wrong with it."""
    system, turns = _read_shape(row)
    turns = tuple(turn.strip() for turn in turns)
    if not turns:
        raise ValueError("no user turn in it")
    if not all(turns):
        raise ValueError("an empty user turn")
    prompt = Prompt(id="", source=str(row.get("source") or row.get("category") or source), turns=turns, system=system)
    given = next((row[key] for key in ("id", "question_id", "conversation_id") if row.get(key) is not None), None)
    return replace(prompt, id=str(given) if given is not None else _digest(prompt))


def share_of(prompt_id: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the id and the purpose alone: what splits rows the same way on every run."""
    digest = hashlib.sha256(f"{purpose}\0{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _read_shape(row: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    if (messages := _list(row, "messages")) is not None:
        return _chat(messages, "role", "content")
    if (messages := _list(row, "conversations")) is not None:
        return _chat(messages, "from", "value")
    if (turns := _list(row, "turns")) is not None:
        return None, tuple(_text(turn) for turn in turns)
    if isinstance(row.get("instruction"), str):
        extra = row.get("input")
        return None, (f"{row['instruction']}\n\n{extra}" if extra else row["instruction"],)
    for key in _PLAIN:
        if (messages := _list(row, key)) is not None:
            return _chat(messages, "role", "content")
        if isinstance(row.get(key), str):
            return None, (row[key],)
    raise ValueError(f"no messages, conversations, turns, instruction or prompt among its keys {sorted(map(str, row))}")


def _chat(messages: Iterable[Any], role_key: str, text_key: str) -> tuple[str | None, tuple[str, ...]]:
    system: str | None = None
    turns: list[str] = []
    for message in messages:
        if not isinstance(message, Mapping) or role_key not in message:
            raise ValueError(f"a message without {role_key!r}: {message!r:.60}")
        if message[role_key] in _SYSTEM and not turns:
            system = _text(message.get(text_key))
        elif message[role_key] in _USER:
            turns.append(_text(message.get(text_key)))
    return system, tuple(turns)


def _text(content: Any) -> str:
    """Text of a message: a string, or OpenAI's list of parts, all of them text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(_text(part.get("text")) for part in content)
    raise ValueError(f"content must be text, got {content!r:.60}")


def _list(row: Mapping[str, Any], key: str) -> list[Any] | None:
    return row[key] if isinstance(row.get(key), list) else None


def _digest(prompt: Prompt) -> str:
    return hashlib.sha256(json.dumps([prompt.system, prompt.turns]).encode()).hexdigest()[:16]


def _cut(prompts: Iterable[Prompt], max_turns: int) -> tuple[Prompt, ...]:
    return tuple(replace(prompt, turns=prompt.turns[:max_turns]) for prompt in prompts)


Row = Callable[[], Mapping[str, Any]]  # reads one record when called; ValueError where it cannot be read


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, partial(_json_object, line)


def _json_object(line: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(record, Mapping):
        raise ValueError(f"expected a JSON object, got a {type(record).__name__}")  # noqa: TRY004
    return record


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{path} is not a Parquet file: {error}") from None
    for number, row in enumerate(table.to_pylist(), start=1):
        yield number, partial(dict, row)
