"""What the two completion protocols share, as pydantic models: OpenAI's fields and this project's own. Pure data.

Every field of OpenAI's request either works or is refused by name; none is silently ignored. A field that this server
does not do passes at the value that asks for nothing (`min_p: 0`, `tools: []`), because clients send those.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from deploy.api.errors import UnsupportedField
from deploy.api.response_format import ResponseFormat
from deploy.api.wire import Wire
from medusa.config import MAX_BIAS, MAX_PENALTY, MAX_TOP_LOGPROBS, Scheme

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_BIASED_TOKENS = 1024

# Field → the values (null besides) that ask for nothing beyond what is done anyway.
NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "chat_template": (),  # a template is a program: the server's own alone is run
    "chat_template_kwargs": ({},),
    "metadata": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "repetition_penalty": (1,),
    "service_tier": ("auto", "default"),
    "store": (False,),
}

Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]  # JSON has no other keys than strings
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
Threshold = Annotated[float, Field(gt=0, le=1)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
TokenLimit = Annotated[int, Field(ge=1)]


def without_no_ops(fields: Any, no_ops: Mapping[str, tuple[Any, ...]]) -> Any:
    """`fields` less those of `no_ops`; raises UnsupportedField for one that asks for something."""
    if not isinstance(fields, Mapping):
        return fields
    for name in fields.keys() & no_ops.keys():
        value, allowed = fields[name], no_ops[name]
        # The type counts: True == 1 in Python, but `repetition_penalty: true` is a mistake.
        if value is not None and not any(value == no_op and _alike(value, no_op) for no_op in allowed):
            instead = f" or send {' or '.join(map(json.dumps, allowed))}" if allowed else ""
            raise UnsupportedField(name, f"{name} is not supported by this server; leave it out{instead}")
    return {name: value for name, value in fields.items() if name not in no_ops}


def _alike(a: Any, b: Any) -> bool:
    return isinstance(a, bool) == isinstance(b, bool)


class UsageIn(enum.Enum):
    """Which chunks of a stream tell usage."""

    NONE = enum.auto()
    LAST_CHUNK = enum.auto()  # OpenAI's include_usage
    EVERY_CHUNK = enum.auto()  # vLLM's continuous_usage_stats beside it


class StreamOptions(Wire):
    """How to stream. `include_usage` adds a last chunk without choices that tells the usage of the whole request; with
    `continuous_usage_stats` (vLLM's) every chunk tells the usage so far."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False  # OpenAI pads chunks against traffic analysis; not done here

    @model_validator(mode="after")
    def _agree(self) -> StreamOptions:
        if self.continuous_usage_stats and not self.include_usage:
            raise ValueError("continuous_usage_stats is only allowed with include_usage: true")
        return self


class GenerationRequest(Wire):
    """What a request for chat and one for a completion have in common. Null means the default, as everywhere in OpenAI's.

    `temperature` is OpenAI's 1 unless given, 0 with greedy acceptance; 0 is greedy. Ours beyond OpenAI: `top_k`,
    `acceptance`, `epsilon`, `delta` (null: the server's configuration decides), `tree_nodes` (most nodes of this request's
    tree), `ignore_eos`.
    """

    no_ops: ClassVar[Mapping[str, tuple[Any, ...]]] = NO_OPS
    prompt_field: ClassVar[str]

    model: str
    max_tokens: TokenLimit | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    n: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] = Field(default=[])
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[TokenKey, Bias] = Field(default={}, max_length=MAX_BIASED_TOKENS)
    response_format: ResponseFormat | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # OpenAI's label for abuse reports; changes no answer
    acceptance: Scheme | None = None
    epsilon: Threshold | None = None
    delta: Threshold | None = None
    tree_nodes: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, fields: Any) -> Any:
        kept = without_no_ops(fields, cls.no_ops)
        return {name: value for name, value in kept.items() if value is not None} if isinstance(kept, dict) else kept

    @model_validator(mode="after")
    def _agree(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        if self.ignore_eos and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("ignore_eos is not allowed with a response_format, which ends the answer; leave one out")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens wanted; None leaves it to the context."""
        return self.max_tokens

    @property
    def limit_field(self) -> str:
        """The field that `limit` was read from."""
        return "max_tokens"

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives whose log-probabilities are wanted beside each token's; None: no log-probabilities at all."""
        raise NotImplementedError

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    @property
    def usage_in(self) -> UsageIn:
        options = self.stream_options or StreamOptions()
        if not options.include_usage:
            return UsageIn.NONE
        return UsageIn.EVERY_CHUNK if options.continuous_usage_stats else UsageIn.LAST_CHUNK


class PromptTokensDetails(Wire):
    cached_tokens: int  # prompt tokens that were taken from the prefix cache


class Usage(Wire):
    """Tokens of one request: of each prompt once, of all answers together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None


class SpeculativeDecoding(Wire):
    """How guessing went, in the words of vLLM's per-request statistics; the prefill's token belongs to no step.

    `mean_acceptance_length` counts the token that every step gives by itself, `draft_acceptance_rate` is null where
    nothing was guessed, `acceptance_histogram[j]` the steps in which j guesses came true. All nodes of a tree below its
    root are draft tokens, though at most `num_spec_tokens`, its depth, can come true together.
    """

    mean_acceptance_length: float
    draft_acceptance_rate: float | None
    acceptance_histogram: list[int]
    num_spec_steps: int
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    num_spec_tokens: int


class Metrics(Wire):
    """What is told of an answer beyond OpenAI's protocol; null for answers that needed no step."""

    speculative_decoding: SpeculativeDecoding | None


class ModelCard(Wire):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "medusa"
    max_model_len: int


class ModelList(Wire):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(Wire):
    """That all is well, and what the server tells beside it."""

    model_config = ConfigDict(extra="allow")

    status: Literal["ok"] = "ok"


class Version(Wire):
    version: str


class ErrorDetail(Wire):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Wire):
    """Every failure on the wire."""

    error: ErrorDetail
