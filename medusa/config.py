"""Frozen, keyword-only settings of the method, validated once where they are made. Knows numbers; knows no tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Literal, get_args

from medusa.grammar import Grammar

Scheme = Literal["greedy", "typical", "rejection"]
RootChoice = Literal["sample", "greedy"]
LmHeads = Literal["shared", "own"]
HeadKind = Literal["medusa", "hydra"]

SCHEMES: tuple[str, ...] = get_args(Scheme)
PENALTIES = ("presence_penalty", "frequency_penalty")

# Typical acceptance, arXiv 2401.10774 §2.3.1: accept x when p(x) > min(epsilon, delta · exp(−H)), delta = sqrt(epsilon).
DEFAULT_EPSILON = 0.09
DEFAULT_DELTA = 0.3
MAX_PENALTY, MAX_BIAS, MAX_TOP_LOGPROBS = 2.0, 100.0, 20  # OpenAI's limits
MAX_HEADS = 64  # or layers of one, in a file: a huge number in a tensor's name must not make us build all below it
MIN_TEMPERATURE = 1e-5  # below it a distribution is its argmax, and logits divided by it may overflow float32
MAX_TEMPERATURE = 1e5  # far above every use; logits are divided by it in float32


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """Shape of the Medusa heads: `num_heads` K, residual layers of each, and whether they read the backbone's lm_head.

    `kind` hydra: each head also reads the embeddings of the tokens before its own on the path (arXiv 2402.05109).
    """

    num_heads: int = 5
    num_layers: int = 1
    lm_heads: LmHeads = "shared"
    kind: HeadKind = "medusa"

    def __post_init__(self) -> None:
        if self.num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {self.num_heads}")
        if self.num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {self.num_layers}")
        if self.lm_heads not in get_args(LmHeads):
            raise ValueError(f"lm_heads must be one of {', '.join(get_args(LmHeads))}, got {self.lm_heads!r}")
        if self.kind not in get_args(HeadKind):
            raise ValueError(f"kind must be one of {', '.join(get_args(HeadKind))}, got {self.kind!r}")

    def num_read(self, head: int) -> int:
        """How many tokens of the path head 0 … K−1 reads: none, or with hydra the root and all before its own."""
        return head + 1 if self.kind == "hydra" else 0


class LogitBias(Mapping[int, float]):
    """What is added to the logits of some token ids: a mapping that cannot change, and so can be hashed and shared.

    ValueError for an id that is no whole number from 0 on, or a value outside [−100, 100].
    """

    def __init__(self, values: Mapping[int, float] | None = None) -> None:
        for token, value in (values or {}).items():
            _require("a token id of logit_bias", token, Integral, "a whole number")
            _require(f"logit_bias of token {token}", value, Real, "a number")
            if token < 0:
                raise ValueError(f"a token id of logit_bias must be 0 or more, got {token}")
            _require_within(f"logit_bias of token {token}", value, MAX_BIAS)
        self._values = {int(token): float(value) for token, value in (values or {}).items()}

    def __getitem__(self, token: int) -> float:
        return self._values[token]

    def __iter__(self) -> Iterator[int]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        return f"LogitBias({self._values})"


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is decoded.

    `acceptance` None means greedy at temperature 0 and typical above it; below MIN_TEMPERATURE every scheme is greedy,
    and from it on greedy contradicts the temperature: ValueError, as for every value out of its range.
    `top_k` 0 and `top_p` 1 switch those filters off. `choice` numbers the answers to one prompt (OpenAI's `n`) and, with
    `seed`, keys the noise: the same pair gives the same answer. `root` says how typical acceptance chooses the token
    that it does not accept from the tree (`greedy` is the paper's). `ignore_eos` decodes on past the end of sequence.
    `tree_nodes` is the most tree nodes that this request may use, 1 being plain decoding (None: all there are). It
    changes the speed of greedy and rejection acceptance, and the answer of typical acceptance.

    `presence_penalty` and `frequency_penalty` (each in [−2, 2]) lower the logits of tokens generated so far, once and
    for each time; `logit_bias` is added to the logits of the token ids it names. Every acceptance scheme sees the logits
    so edited. `logprobs` asks for the log-probability of each token and of that many best alternatives (0 to 20; None
    asks for nothing), all of the model's own distribution: at temperature 1 and before any edit. With a `grammar` the
    answer is a whole document of it, or a part where max_tokens or a stop cuts it short.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    choice: int = 0
    acceptance: Scheme | None = None
    epsilon: float = DEFAULT_EPSILON
    delta: float = DEFAULT_DELTA
    root: RootChoice = "sample"
    ignore_eos: bool = False
    tree_nodes: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=LogitBias)
    logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "seed", "choice"):
            _require(name, getattr(self, name), Integral, "a whole number")
        for name in ("temperature", "top_p", "epsilon", "delta", *PENALTIES):
            _require(name, getattr(self, name), Real, "a number")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(f"temperature must lie in [0, {MAX_TEMPERATURE:g}], got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k must lie in [0, 2**31), 0 being off, got {self.top_k}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in [0, 2**63), got {self.seed}")
        if not 0 <= self.choice < 2**31:
            raise ValueError(f"choice must lie in [0, 2**31), got {self.choice}")
        if self.acceptance is not None and self.acceptance not in SCHEMES:
            raise ValueError(f"unknown acceptance {self.acceptance!r}; choose one of {', '.join(SCHEMES)}")
        if self.acceptance == "greedy" and self.temperature >= MIN_TEMPERATURE:
            raise ValueError(
                f"acceptance 'greedy' takes the likeliest token, which no temperature changes, got temperature "
                f"{self.temperature}; leave one of the two out"
            )
        if not 0 < self.epsilon <= 1:
            raise ValueError(f"epsilon must lie in (0, 1], got {self.epsilon}")
        if not 0 < self.delta <= 1:
            raise ValueError(f"delta must lie in (0, 1], got {self.delta}")
        if self.tree_nodes is not None:
            _require("tree_nodes", self.tree_nodes, Integral, "a whole number")
            if not 1 <= self.tree_nodes < 2**31:
                raise ValueError(f"tree_nodes must lie in [1, 2**31), 1 being plain decoding, got {self.tree_nodes}")
        if self.root not in get_args(RootChoice):
            raise ValueError(f"root must be one of {', '.join(get_args(RootChoice))}, got {self.root!r}")
        for name in PENALTIES:
            _require_within(name, getattr(self, name), MAX_PENALTY)
        if not isinstance(self.logit_bias, LogitBias):
            _require("logit_bias", self.logit_bias, Mapping, "a mapping of token ids to numbers")
            object.__setattr__(self, "logit_bias", LogitBias(self.logit_bias))
        if self.logprobs is not None:
            _require("logprobs", self.logprobs, Integral, "a whole number or None")
            if not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
                raise ValueError(f"logprobs must lie in [0, {MAX_TOP_LOGPROBS}], got {self.logprobs}")
        if self.grammar is not None:
            if not isinstance(self.grammar, Grammar):
                raise ValueError(f"grammar must be a Grammar (Grammar.json_schema makes one), got {self.grammar!r}")
            if self.ignore_eos:
                raise ValueError(
                    "a grammar ends the answer with the end of sequence; leave out ignore_eos, or the grammar"
                )

    @property
    def scheme(self) -> Scheme:
        """The acceptance scheme in force."""
        if self.temperature < MIN_TEMPERATURE:
            return "greedy"
        return self.acceptance or "typical"

    @property
    def any_penalty(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty)


def _require(name: str, value: object, kind: type, said: str) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} must be {said}, got {value!r}")  # noqa: TRY004  one kind of error for bad settings


def _require_within(name: str, value: float, limit: float) -> None:
    if not -limit <= value <= limit:
        raise ValueError(f"{name} must lie in [{-limit:g}, {limit:g}], got {value}")
