"""The backbone answers prompts: batches of text in, rows of `records.ANSWERS` out. Knows the engine; knows no Ray.

A prompt that cannot be answered becomes a row with its `error`; the others go on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from medusa.config import SamplingParams
from medusa.errors import PromptError
from pipelines.config import BackboneSection, DistillSection
from pipelines.prompts import Prompt
from pipelines.records import ANSWERS, sampling_key

if TYPE_CHECKING:
    import pyarrow as pa

    from medusa import Model
    from medusa.engine import Engine


@dataclass(kw_only=True)
class _Chat:
    """One conversation under way: the messages so far; None once a turn has failed."""

    prompt: Prompt
    part: str
    messages: list[dict[str, str]] | None = field(default_factory=list)


def turn_id(prompt_id: str, turn: int) -> str:
    """The id of turn 1, 2, … of a prompt."""
    return prompt_id if turn == 1 else f"{prompt_id}/{turn}"


def sampling_seed(seed: int, row_id: str) -> int:
    """A seed for one row: its answer depends on the configured seed and its id, not on its neighbours."""
    digest = hashlib.sha256(f"{seed}\0{row_id}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def answer_prompts(
    model: Model, engine: Engine, asked: Iterable[tuple[Prompt, str]], config: DistillSection
) -> list[dict[str, Any]]:
    """Answer (prompt, part) pairs turn by turn, each later turn behind the backbone's own earlier answers.

    All prompts' first turns share the batch, then all second turns, and so on. Rejection acceptance above temperature
    0, so that the heads never change what is said.
    """
    chats = [_Chat(prompt=prompt, part=part) for prompt, part in asked]
    for chat in chats:
        if chat.messages is not None and chat.prompt.system is not None:
            chat.messages.append({"role": "system", "content": chat.prompt.system})
    rows: list[dict[str, Any]] = []
    for turn in range(1, max((len(chat.prompt.turns) for chat in chats), default=0) + 1):
        live = [chat for chat in chats if chat.messages is not None and len(chat.prompt.turns) >= turn]
        rows += _answer_turn(model, engine, live, turn, config)
    return rows


def _answer_turn(
    model: Model, engine: Engine, chats: list[_Chat], turn: int, config: DistillSection
) -> list[dict[str, Any]]:
    from medusa.engine import Request

    common = {"sampling": sampling_key(config), "backbone": model.backbone.fingerprint}
    rows: dict[str, dict[str, Any]] = {}
    by_id: dict[str, _Chat] = {}
    requests: list[Request] = []
    for chat in chats:
        assert chat.messages is not None
        row_id = turn_id(chat.prompt.id, turn)
        chat.messages.append({"role": "user", "content": chat.prompt.turns[turn - 1]})
        by_id[row_id] = chat
        rows[row_id] = _empty_row(chat, row_id) | common
        try:
            rows[row_id]["prompt_ids"] = model.encode(chat.messages)
        except PromptError as error:
            rows[row_id]["error"] = str(error)
            chat.messages = None
            continue
        params = SamplingParams(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=sampling_seed(config.seed, row_id),
            acceptance="rejection",
        )
        requests.append(Request(prompt_ids=rows[row_id]["prompt_ids"], params=params, request_id=row_id))
    for completion in engine.run(requests):
        chat, row = by_id[completion.request_id], rows[completion.request_id]
        if completion.error is not None:
            row["error"] = completion.error
            chat.messages = None
            continue
        text = model.backbone.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        row |= {"response_ids": completion.token_ids, "response": text, "finish_reason": completion.finish_reason}
        assert chat.messages is not None
        chat.messages.append({"role": "assistant", "content": text})
    return list(rows.values())


def _empty_row(chat: _Chat, row_id: str) -> dict[str, Any]:
    return {
        "id": row_id,
        "prompt_id": chat.prompt.id,
        "source": chat.prompt.source,
        "part": chat.part,
        "prompt_ids": [],
        "response_ids": [],
        "response": "",
        "finish_reason": None,
        "error": None,
    }


class Answerer:
    """One engine in an actor of Ray Data's pool: an Arrow batch of `prompt_table` in, one of `ANSWERS` out."""

    def __init__(self, backbone: BackboneSection, config: DistillSection) -> None:
        from medusa.engine import Engine
        from pipelines.models import load_model, use_threads

        use_threads(config.threads, processes=config.num_actors)
        self.config = config
        self.model = load_model(backbone, config.heads)
        self.engine = Engine(
            self.model.backbone,
            self.model.heads,
            tree=self.model.tree,
            max_batch_size=config.batch_size,
            context_length=min(config.context_length, self.model.backbone.max_context),
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        import pyarrow as pa

        asked = [(_prompt(row), row["part"]) for row in batch.to_pylist()]
        return pa.Table.from_pylist(answer_prompts(self.model, self.engine, asked, self.config), schema=ANSWERS)


def prompt_table(asked: Iterable[tuple[Prompt, str]]) -> pa.Table:
    """(prompt, part) pairs as the table that `Answerer` takes."""
    import pyarrow as pa

    schema = pa.schema(
        [
            pa.field("id", pa.string()),
            pa.field("source", pa.string()),
            pa.field("part", pa.string()),
            pa.field("turns", pa.list_(pa.string())),
            pa.field("system", pa.string()),
        ]
    )
    rows = [
        {"id": p.id, "source": p.source, "part": part, "turns": list(p.turns), "system": p.system} for p, part in asked
    ]
    return pa.Table.from_pylist(rows, schema=schema)


def _prompt(row: dict[str, Any]) -> Prompt:
    return Prompt(id=row["id"], source=row["source"], turns=tuple(row["turns"]), system=row["system"])
