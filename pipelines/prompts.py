"""Prompts of any common shape, and the built-in ones. Knows text; knows no files' formats, no tokens, no model, no Ray.

Shapes of a record, the first that fits:
    messages       OpenAI chat      [{"role": "user", "content": …}, …]
    conversations  ShareGPT         [{"from": "human", "value": …}, …]
    turns          MT-Bench         ["first question", "second question"]
    instruction    Alpaca           with an optional "input"
    prompt | text | question        plain text
Only what the user said (and one system or developer message before it) is kept: the backbone writes the answers itself, turn
by turn. A record may carry its own `id`, `source`, `category`, `temperature`, `top_p` and `seed`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medusa.config import MAX_TEMPERATURE
from medusa.errors import PromptError
from pipelines.builtin_prompts import BUILTIN, NUM_CALIBRATION, NUM_TRAIN
from pipelines.config import EvaluateSection, PromptsSection
from pipelines.credentials import without_credentials
from pipelines.prompt_files import find_files

logger = logging.getLogger(__name__)

_USER, _SYSTEM = {"user", "human", "prompter"}, {"system", "developer"}
_PLAIN = ("prompt", "text", "question")
_SHAPES = "messages, conversations, turns, instruction, prompt, text or question"  # as messages give them
_ALL_TOLD = 20  # bad records that are named one by one; the rest are counted


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One conversation's user side: `turns` in order, none empty. `id` is unique among the prompts read together.

    `source` names the collection it comes from, `category` its kind within it, by which an evaluation is told apart.
    Sampling settings that are None are the configured ones.
    """

    id: str
    source: str
    turns: tuple[str, ...]
    category: str | None = None
    system: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Disjoint prompts for the heads and for the tree."""

    train: tuple[Prompt, ...]
    calibration: tuple[Prompt, ...]


def prompt_parts(config: PromptsSection, self_prompted: Sequence[Prompt] = ()) -> Parts:
    """The prompts that distillation answers, cut to the configured limits. Raises ConfigError, PromptError.

    `self_prompted` come behind those of the files; without files they stand alone. Of few prompts, of which chance would
    give calibration none, it gets the one that is nearest to it.
    """
    if config.path is None and not self_prompted:
        train, calibration = builtin_prompts("train"), builtin_prompts("calibration")
    else:
        prompts = [*(read_prompts(config.path) if config.path is not None else ()), *self_prompted]
        shares = {prompt.id: share_of(prompt.id, "calibration") for prompt in prompts}
        calibration = [prompt for prompt in prompts if shares[prompt.id] < config.calibration_share]
        if not calibration and config.calibration_share and len(prompts) > 1:
            calibration = [min(prompts, key=lambda prompt: shares[prompt.id])]
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


def read_prompts(
    path: str | Path | Sequence[str | Path], *, report: Callable[[str], None] = logger.warning
) -> list[Prompt]:
    """Every prompt of a source (see `prompt_files`) or of several, in their order; equal ones once.

    A record that is no prompt is handed to `report` as "file:line is left out: why" and the others go on. Where one id names
    different prompts, each takes an id of its own. Raises ConfigError when a source is missing or damaged, PromptError
    when nothing in it is a prompt.
    """
    sources = [str(path)] if isinstance(path, (str, Path)) else [str(one) for one in path]
    found: dict[Prompt, Prompt] = {}
    first_fault, num_faults = "the files are empty", 0
    for file in (file for source in sources for file in find_files(source)):
        for number, read in file.records():
            try:
                prompt = parse_prompt(read(), source=file.stem)
                found.setdefault(replace(prompt, source="", category=None), prompt)
            except (ValueError, RecursionError) as error:
                num_faults += 1
                first_fault = f"{number}: {error}" if num_faults == 1 else first_fault
                if num_faults <= _ALL_TOLD:
                    report(f"{file.name}:{number} is left out: {error}")
    if num_faults > _ALL_TOLD:
        report(f"{num_faults - _ALL_TOLD} more records are no prompts and left out")
    if not found:
        read_from = without_credentials(", ".join(sources))
        raise PromptError(f"{read_from} holds no prompt ({first_fault}); each record must have {_SHAPES}")
    return _told_apart(list(found.values()))


def _told_apart(prompts: list[Prompt]) -> list[Prompt]:
    """An id that several prompts bear is lengthened for all of them, so that no order of files decides who keeps it."""
    times = Counter(prompt.id for prompt in prompts)
    return [replace(p, id=f"{p.id}-{prompt_digest(p)[:12]}") if times[p.id] > 1 else p for p in prompts]


def parse_prompt(row: Mapping[str, Any], *, source: str) -> Prompt:
    """One record of any shape above. ValueError says what is wrong with it; RecursionError: nested too deeply."""
    system, turns = _read_shape(row)
    turns = tuple(turn.strip() for turn in turns)
    if not turns:
        raise ValueError("no user turn in it")
    if not all(turns):
        raise ValueError("an empty user turn")
    try:
        "".join((*turns, system or "")).encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair in its text, which is not Unicode") from None
    prompt = Prompt(
        id="",
        source=str(row.get("source") or source),
        turns=turns,
        category=str(row["category"]) if row.get("category") else None,
        system=system,
        temperature=_number(
            row, "temperature", lambda value: 0 <= value <= MAX_TEMPERATURE, f"in [0, {MAX_TEMPERATURE:g}]"
        ),
        top_p=_number(row, "top_p", lambda value: 0 < value <= 1, "in (0, 1]"),
        seed=_whole(row, "seed"),
    )
    given = next((row[key] for key in ("id", "question_id", "conversation_id") if row.get(key) is not None), None)
    return replace(prompt, id=str(given) if given is not None else prompt_digest(prompt))


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
    raise ValueError(f"no {_SHAPES} among its keys {sorted(map(str, row))}")


def _chat(messages: Iterable[Any], role_key: str, text_key: str) -> tuple[str | None, tuple[str, ...]]:
    system: str | None = None
    turns: list[str] = []
    for message in messages:
        if not isinstance(message, Mapping) or role_key not in message:
            raise ValueError(f"a message without {role_key!r}: {message!r:.60}")
        if message[role_key] in _SYSTEM:
            if turns or system is not None:  # dropped or joined, it would be distilled otherwise than it is served
                raise ValueError(f"a {message[role_key]} message that is not the one at the beginning: join them there")
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


def _number(row: Mapping[str, Any], key: str, fits: Callable[[float], bool], limit: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
        raise ValueError(f"{key} must be {limit}, got {value!r:.40}")
    return float(value)


def _whole(row: Mapping[str, Any], key: str) -> int | None:
    value = row.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63):
        raise ValueError(f"{key} must be a whole number in [0, 2**63), got {value!r:.40}")
    return value


def prompt_digest(prompt: Prompt) -> str:
    """Names what is asked, whatever its id. Settings count only where a record has some."""
    settings = [prompt.temperature, prompt.top_p, prompt.seed]
    asked = [prompt.system, prompt.turns] + (settings if any(item is not None for item in settings) else [])
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def _cut(prompts: Iterable[Prompt], max_turns: int) -> tuple[Prompt, ...]:
    return tuple(replace(prompt, turns=prompt.turns[:max_turns]) for prompt in prompts)
