"""The backbone writes prompts itself: it continues the chat template's open user turn. Knows text, engine, and the pool.

After Magpie (arXiv 2406.08464). Turns are drawn by number, a seed for each, so the same settings give the same prompts
whatever dies meanwhile; they are committed like answers (see `pool`) and then judged in the order of their numbers.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from medusa.config import SamplingParams
from pipelines.answering import EngineActor, sampling_seed
from pipelines.cluster import ray_session
from pipelines.config import BackboneSection, Config, DistillSection, SelfPromptSection
from pipelines.errors import ConfigError, StageError
from pipelines.pool import Pool, Watch
from pipelines.prompts import Prompt, read_prompts
from pipelines.records import same_sampling
from pipelines.stage import Progress, Step

if TYPE_CHECKING:
    from medusa import Model
    from medusa.engine import Completion, Engine

logger = logging.getLogger(__name__)

SOURCE = "self"
WRITTEN = pa.schema(
    [
        pa.field("number", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("finish_reason", pa.string()),
        pa.field("settings", pa.string(), nullable=False),  # see settings_key
        pa.field("fault", pa.string()),  # why the turn is degenerate; null where it is not
        pa.field("error", pa.string()),
    ]
)
_MARK = "\u2402user\u2403"  # stands where the turn will be; no template knows it
_MIN_CHARACTERS = 12
_MIN_VARIETY = 0.5  # distinct character 5-grams of all; ordinary prose of this length has above 0.8
_GRAM = 5


@dataclass(frozen=True, kw_only=True)
class OpenTurn:
    """The chat template around a user turn: ids before it, and what ends it, as text and as ids."""

    prefix_ids: tuple[int, ...]
    closing: str
    closing_ids: tuple[int, ...]


def self_prompts(config: Config, progress: Progress) -> list[Prompt]:
    """`prompts.self_prompt.num` prompts, or as many as `max_tries` gave. Raises ConfigError, StageError.

    None is like another, nor like a prompt of `prompts.path`.
    """
    section = config.prompts.self_prompt
    settings = settings_key(section, config.backbone)
    pool = Pool(
        folder=config.layout.root / "self-prompts",
        key="number",
        worker=Writer,
        args=(config.backbone, section, config.distill),
        settings=config.distill,
    )
    given = [turn for p in read_prompts(config.prompts.path) for turn in p.turns] if config.prompts.path else []
    most = math.ceil(section.num * section.max_tries)
    asked = 0
    with pool.alone():
        while True:
            chosen = choose(_read(pool, settings, asked), section, given)
            missing = section.num - len(chosen.prompts)
            if missing <= 0 or asked == most:
                break
            asked = min(most, asked + missing + missing // 2 + 8)
            _write(range(asked), pool, config, progress)
    logger.info("%s; %d are wanted", chosen.summary, section.num)
    if not chosen.prompts:
        raise StageError(f"the backbone wrote no usable prompt: {chosen.summary}; give prompts.path")
    return list(chosen.prompts[: section.num])


def _write(numbers: Iterable[int], pool: Pool, config: Config, progress: Progress) -> None:
    done = pool.done()
    wanted = [str(number) for number in numbers]
    missing = [number for number in wanted if number not in done or done[number]]
    if missing:
        total = len(wanted)
        watch = Watch(
            progress,
            key="number",
            done_before=total - len(missing),
            total=total,
            clock=time.monotonic,
            what="drafts of prompts",
        )
        with ray_session(config):
            pool.run(pa.table({"number": missing}), watch)
    progress(Step(done=len(wanted), total=len(wanted), note="drafts of prompts"))


def _read(pool: Pool, settings: str, asked: int) -> Iterator[dict[str, Any]]:
    """Turns 0 … asked−1 in order. ConfigError where they were written with other settings."""
    rows: dict[int, dict[str, Any]] = {}
    pool.done()
    for file in sorted(pool.folder.glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            if not same_sampling(row["settings"], settings):
                raise ConfigError(
                    f"{pool.folder} holds prompts written with {row['settings']}, asked for is {settings}; "
                    "use another workdir, or remove it"
                )
            rows[int(row["number"])] = row
    yield from (rows[number] for number in sorted(rows) if number < asked)


def settings_key(section: SelfPromptSection, backbone: BackboneSection) -> str:
    """What a turn depends on, as one string for `same_sampling`."""
    settings = section.model_dump(include={"max_tokens", "temperature", "top_p", "seed"})
    return json.dumps(settings | {"backbone": backbone.name, "dtype": backbone.decodes_in}, sort_keys=True)


# Judging


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Prompts that passed, in the order of their numbers, and how many turns fell out for which reason."""

    prompts: tuple[Prompt, ...]
    dropped: dict[str, int]

    @property
    def summary(self) -> str:
        reasons = ", ".join(f"{name} {count}" for name, count in sorted(self.dropped.items()))
        written = len(self.prompts) + sum(self.dropped.values())
        return f"{len(self.prompts)} of {written} written prompts kept (dropped: {reasons or 'none'})"


def choose(rows: Iterable[dict[str, Any]], section: SelfPromptSection, given: Iterable[str] = ()) -> Chosen:
    """Rows of WRITTEN in the order of their numbers → those that are neither degenerate nor like an earlier or given one."""
    seen = NearDuplicates(section.max_similarity)
    for text in given:
        seen.add(text)
    kept: list[Prompt] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        fault = "failed" if row["error"] is not None else row["fault"]
        if fault is None and not seen.add(row["text"]):
            fault = "near-duplicate"
        if fault is None:
            kept.append(Prompt(id=f"self-{section.seed}-{row['number']}", source=SOURCE, turns=(row["text"],)))
        else:
            dropped[fault] += 1
    return Chosen(prompts=tuple(kept), dropped=dict(dropped))


def fault_of(text: str, *, finished: bool, special: Iterable[str]) -> str | None:
    """Why a written turn is no prompt; None where it is one. `special` are strings that only templates write."""
    if not finished:
        return "cut off"
    if any(mark in text for mark in special):
        return "template tokens"
    if sum(character.isalnum() for character in text) < _MIN_CHARACTERS:
        return "too short"
    normal = _normal(text)
    if len(_grams(normal)) < _MIN_VARIETY * (len(normal) - _GRAM + 1):
        return "repetitive"
    return None


class NearDuplicates:
    """Texts whose Jaccard similarity of character 5-grams stays below a limit, pairwise. Exact, by prefix filtering.

    Two sets of similarity t or more share one of their first |a| − ⌈t·|a|⌉ + 1 members in any common order, so only
    those are indexed, and only texts that share one are compared.
    """

    def __init__(self, max_similarity: float) -> None:
        self._limit = max_similarity
        self._sets: list[frozenset[int]] = []
        self._index: dict[int, list[int]] = defaultdict(list)

    def add(self, text: str) -> bool:
        """Keep a text unless it is like one that is kept; was it kept?"""
        grams = _grams(_normal(text))
        # A little more than exact arithmetic asks for, against ⌈·⌉ of a product that is a hair too large.
        prefix = sorted(grams)[: len(grams) - math.ceil(self._limit * len(grams) - 1e-9) + 1]
        near = {other for gram in prefix for other in self._index[gram]}
        if any(similarity(grams, self._sets[other]) >= self._limit for other in near):
            return False
        for gram in prefix:
            self._index[gram].append(len(self._sets))
        self._sets.append(grams)
        return True


def similarity(a: frozenset[int], b: frozenset[int]) -> float:
    """Jaccard: shared members of all members."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def _normal(text: str) -> str:
    """Letters and digits alone, one space between words: what punctuation and case hide."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _grams(normal: str) -> frozenset[int]:
    """Character 5-grams as numbers that are the same in every process; of a shorter text the whole."""
    starts = range(max(1, len(normal) - _GRAM + 1))
    return frozenset(zlib.crc32(normal[start : start + _GRAM].encode()) for start in starts)


# Writing


def open_turn(tokenizer: Any) -> OpenTurn:
    """The chat template cut where the user's words stand. StageError where there is no such place."""
    if not tokenizer.chat_template:
        raise StageError("the backbone has no chat template, so it has no user turn to write; give prompts.path")
    text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    before, mark, after = text.partition(_MARK)
    if not mark or not before or not after.strip():
        raise StageError("the backbone's chat template does not frame the user's turn; give prompts.path")
    ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    closing = after.strip()
    return OpenTurn(
        prefix_ids=tuple(ids),
        closing=closing,
        closing_ids=tuple(tokenizer(closing, add_special_tokens=False)["input_ids"]),
    )


def write_turns(
    model: Model, engine: Engine, numbers: Iterable[str], section: SelfPromptSection
) -> list[dict[str, Any]]:
    """One row of WRITTEN for each number, its `settings` left out."""
    from medusa.engine import Request

    frame = open_turn(model.backbone.tokenizer)
    requests = [
        Request(
            prompt_ids=list(frame.prefix_ids),
            params=SamplingParams(
                max_tokens=section.max_tokens,
                temperature=section.temperature,
                top_p=section.top_p,
                seed=sampling_seed(section.seed, number),
                acceptance="rejection",
            ),
            request_id=number,
            on_token=_Closing(frame.closing_ids),
        )
        for number in numbers
    ]
    return [_row(model, frame, completion) for completion in engine.run(requests)]


def _row(model: Model, frame: OpenTurn, completion: Completion) -> dict[str, Any]:
    tokenizer, ids = model.backbone.tokenizer, completion.token_ids
    words = ids[:-1] if ids and ids[-1] in model.backbone.eos_token_ids else ids
    text = tokenizer.decode(words, skip_special_tokens=False).split(frame.closing)[0].strip()
    special = {*tokenizer.all_special_tokens, frame.closing}
    failed = completion.error is not None
    return {
        "number": completion.request_id,
        "text": text,
        "response_ids": ids,
        "finish_reason": None if failed else completion.finish_reason,
        "fault": None if failed else fault_of(text, finished=completion.finish_reason == "stop", special=special),
        "error": completion.error,
    }


class _Closing:
    """Ends an answer once it ends with these ids: not every template closes the user's turn with an end of sequence."""

    def __init__(self, ids: tuple[int, ...]) -> None:
        self._ids = ids
        self._last: tuple[int, ...] = ()

    def __call__(self, token: int) -> bool:
        self._last = (*self._last, token)[-len(self._ids) :]
        return self._last == self._ids


class Writer(EngineActor):
    """A table of numbers in, one of WRITTEN out."""

    def __init__(self, backbone: BackboneSection, section: SelfPromptSection, config: DistillSection) -> None:
        super().__init__(backbone, config)
        self._section = section
        self._settings = settings_key(section, backbone)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = write_turns(*self.ready(), batch["number"].to_pylist(), self._section)
        return pa.Table.from_pylist([row | {"settings": self._settings} for row in rows], schema=WRITTEN)
