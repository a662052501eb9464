"""The backbone answers prompts: batches of text in, rows of `records.ANSWERS` out. Knows the engine; knows no Ray.

A prompt that cannot be answered becomes a row with its `error`; the others go on.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from medusa.backbone import dtype_name
from medusa.config import SamplingParams
from medusa.errors import MedusaError, PromptError
from pipelines.config import BackboneSection, DistillSection
from pipelines.errors import StageError
from pipelines.memory import GIB, free_bytes
from pipelines.prompts import Prompt, prompt_digest
from pipelines.records import ANSWERS, sampling_key

if TYPE_CHECKING:
    import pyarrow as pa

    from medusa import Model
    from medusa.engine import Completion, Engine, Request
    from medusa.tree import Tree

# The largest batch for which the heads' own tree is worth its arithmetic. On a CPU a step of 16 tokens costs 1.5 times
# one of a single token, and one of 64 about 2.5 times: a second row already uses what a tree would.
TREE_BATCH_LIMIT = {"cpu": 1, "cuda": 16}


@dataclass(kw_only=True)
class _Chat:
    """One conversation under way: the messages so far, and the row of the turn that is being answered."""

    prompt: Prompt
    part: str
    turn: int = 0
    messages: list[dict[str, str]] = field(default_factory=list)
    row: dict[str, Any] = field(default_factory=dict)


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

    The batch is kept full: a chat's next turn goes in as soon as its last is answered, before chats not yet begun.
    Rejection acceptance above temperature 0, so that the heads never change what is said.
    """
    waiting = deque(_begin(prompt, part) for prompt, part in asked)
    sampling = sampling_key(config, dtype_name(model.backbone.weight_dtype))
    common = {"sampling": sampling, "backbone": model.backbone.fingerprint}
    running: dict[str, _Chat] = {}
    rows: list[dict[str, Any]] = []
    while waiting or engine.has_work:
        while waiting and engine.num_active + engine.num_waiting < engine.max_batch_size:
            chat = waiting.popleft()
            chat.row = _next_row(chat, config) | common
            rows.append(chat.row)
            try:
                chat.row["prompt_ids"] = model.encode(chat.messages)
                request = _request(chat, config, name=str(len(rows)))
                engine.submit(request)
            except PromptError as error:
                chat.row["error"] = str(error)
                continue
            running[request.request_id] = chat
        for delta in engine.step() if engine.has_work else []:
            if delta.completion is not None:
                chat = running.pop(delta.request_id)
                _answered(model, chat, delta.completion)
                if chat.turn < len(chat.prompt.turns):
                    waiting.appendleft(chat)
    return rows


def _begin(prompt: Prompt, part: str) -> _Chat:
    system = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
    return _Chat(prompt=prompt, part=part, messages=system)


def _next_row(chat: _Chat, config: DistillSection) -> dict[str, Any]:
    """Say the next turn of a chat; the row of its answer, still without one."""
    chat.turn += 1
    chat.messages.append({"role": "user", "content": chat.prompt.turns[chat.turn - 1]})
    prompt, row_id = chat.prompt, turn_id(chat.prompt.id, chat.turn)
    return {
        "id": row_id,
        "prompt_id": prompt.id,
        "source": prompt.source,
        "part": chat.part,
        "prompt_ids": [],
        "response_ids": [],
        "response": "",
        "finish_reason": None,
        "temperature": config.temperature if prompt.temperature is None else prompt.temperature,
        "top_p": config.top_p if prompt.top_p is None else prompt.top_p,
        "seed": sampling_seed(config.seed if prompt.seed is None else prompt.seed, row_id),
        "error": None,
        "asked": prompt_digest(prompt),
    }


def _request(chat: _Chat, config: DistillSection, *, name: str) -> Request:
    from medusa.engine import Request

    row = chat.row
    params = SamplingParams(
        max_tokens=config.max_tokens,
        temperature=row["temperature"],
        top_p=row["top_p"],
        seed=row["seed"],
        acceptance="rejection",
    )
    return Request(prompt_ids=row["prompt_ids"], params=params, request_id=name)


def _answered(model: Model, chat: _Chat, completion: Completion) -> None:
    text = model.backbone.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    chat.row |= {"response_ids": completion.token_ids, "response": text, "finish_reason": completion.finish_reason}
    chat.messages.append({"role": "assistant", "content": text})


def choose_tree(model: Model, config: DistillSection) -> Tree:
    """The tree that serves this batch size best; one node is plain decoding. ValueError where the heads cannot fill it."""
    from medusa.tree import Tree

    plain = config.batch_size > TREE_BATCH_LIMIT.get(model.backbone.device.type, 0)
    if config.tree_nodes == 1 or (config.tree_nodes is None and plain):
        return Tree.root_only()
    return model.resolve_tree(config.tree_nodes)


def make_engine(model: Model, config: DistillSection) -> Engine:
    """An engine with room for the configured batch. Raises StageError, saying what to lower, where memory is short."""
    from medusa.engine import Engine

    tree = choose_tree(model, config)
    heads = model.heads if tree.num_nodes > 1 else None
    length = min(config.context_length, model.backbone.max_context)
    need, free = cache_bytes(model, config.batch_size, length), free_bytes(model.backbone.device)
    advice = "lower distill.batch_size or distill.context_length"
    if free is not None and need > free:
        raise StageError(
            f"{config.batch_size} sequences of {length} tokens need {need / GIB:.1f} GiB of keys and values, "
            f"and {free / GIB:.1f} GiB are free; {advice}"
        )
    try:
        return Engine(model.backbone, heads, tree=tree, max_batch_size=config.batch_size, context_length=length)
    except (MemoryError, RuntimeError) as error:  # how torch tells that an allocation failed, on a CPU and on a GPU
        if "memory" not in str(error):
            raise
        raise StageError(f"no memory for {config.batch_size} sequences of {length} tokens; {advice}") from error


def cache_bytes(model: Model, batch_size: int, context_length: int) -> int:
    """Keys and values of `batch_size` sequences of `context_length` tokens."""
    probe = model.backbone.new_cache(num_slots=1, capacity=1).store
    return probe.numel() * probe.element_size() * batch_size * context_length


class EngineActor:
    """What the actors of Ray Data's pool share: one model and one engine, loaded once."""

    def __init__(self, backbone: BackboneSection, config: DistillSection) -> None:
        from pipelines.models import load_model, use_threads

        use_threads(config.threads, processes=config.num_actors)
        # Ray restarts an actor that cannot be built, for ever; one that fails at its first batch ends the run.
        self._fault: str | None = None
        try:
            self._model = load_model(backbone, config.heads)
            refuse_tuned(self._model, config.heads)
            self._engine = make_engine(self._model, config)
        except (MedusaError, ValueError) as error:
            self._fault = str(error)

    def ready(self) -> tuple[Model, Engine]:
        """Raises StageError where they could not be loaded."""
        if self._fault is not None:
            raise StageError(self._fault)
        return self._model, self._engine


def refuse_tuned(model: Model, heads: str) -> None:
    """StageError for MEDUSA-2 heads: they tune the backbone, and answers must be those of the original."""
    if model.checkpoint is not None and model.checkpoint.adapters is not None:
        raise StageError(
            f"distill.heads {heads} tune the backbone (MEDUSA-2), so the answers would not be {model.backbone.name}'s own; "
            'give MEDUSA-1 heads, or "none"'
        )


class Answerer(EngineActor):
    """An Arrow batch of `prompt_table` in, one of `ANSWERS` out.

    `written_by` is the fingerprint of the backbone whose answers are there already, if there are any.
    """

    def __init__(self, backbone: BackboneSection, config: DistillSection, written_by: str | None = None) -> None:
        super().__init__(backbone, config)
        self._config = config
        if self._fault is None and written_by not in (None, self._model.backbone.fingerprint):
            self._fault = (
                f"the answers that are there were written by backbone {written_by}, {self._model.backbone.name} is "
                f"{self._model.backbone.fingerprint}; use another workdir, or remove them"
            )

    def __call__(self, batch: pa.Table) -> pa.Table:
        import pyarrow as pa

        asked = [(_prompt(row), row["part"]) for row in batch.to_pylist()]
        return pa.Table.from_pylist(answer_prompts(*self.ready(), asked, self._config), schema=ANSWERS)


def prompt_table(asked: Iterable[tuple[Prompt, str]]) -> pa.Table:
    """(prompt, part) pairs as the table that `Answerer` takes."""
    import pyarrow as pa

    schema = pa.schema(
        [
            pa.field("id", pa.string()),
            pa.field("source", pa.string()),
            pa.field("part", pa.string()),
            pa.field("turns", pa.list_(pa.string())),
            pa.field("category", pa.string()),
            pa.field("system", pa.string()),
            pa.field("temperature", pa.float64()),
            pa.field("top_p", pa.float64()),
            pa.field("seed", pa.int64()),
        ]
    )
    rows = [asdict(prompt) | {"turns": list(prompt.turns), "part": part} for prompt, part in asked]
    return pa.Table.from_pylist(rows, schema=schema)


def _prompt(row: dict[str, Any]) -> Prompt:
    given = {name: row[name] for name in Prompt.__dataclass_fields__}
    return Prompt(**given | {"turns": tuple(row["turns"])})
