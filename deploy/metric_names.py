"""Every metric that a server exports, defined once for all outlets. Pure data, in the style of vLLM's names.

`generation_tokens` is exported as `medusa_generation_tokens_total` on the HTTP port and, because Ray puts its own word
before every name, as `ray_medusa_generation_tokens_total` on Ray's metrics ports. vLLM's colon after the first word is
refused there, so it is an underscore everywhere. Each metric has the label `model_name`; the labels named here have few
values, all of our own choosing. Help texts say what is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NAMESPACE = "medusa"
MODEL_LABEL = "model_name"

_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 20, 40, 80, 160, 640)
_STEP_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_RATES = (1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.5, 4, 5, 6)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One metric: what kind it is, its name without namespace and suffix, its own labels, a histogram's bounds."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        return f"{NAMESPACE}_{self.name}"

    @property
    def series(self) -> tuple[str, ...]:
        """The names that a scrape finds on the HTTP port."""
        suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
        return tuple(self.full_name + suffix for suffix in suffixes[self.kind])


SPECS: list[Spec] = []


def _gauge(name: str, help: str, *labels: str) -> Spec:
    SPECS.append(Spec(kind="gauge", name=name, help=help, labels=labels))
    return SPECS[-1]


def _counter(name: str, help: str, *labels: str) -> Spec:
    SPECS.append(Spec(kind="counter", name=name, help=help, labels=labels))
    return SPECS[-1]


def _histogram(name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Spec:
    SPECS.append(Spec(kind="histogram", name=name, help=help, labels=labels, buckets=buckets))
    return SPECS[-1]


RUNNING = _gauge("num_requests_running", "Requests that hold a slot.")
WAITING = _gauge("num_requests_waiting", "Requests that wait for a slot.")
SLOTS = _gauge("num_slots", "Slots: most requests that run at once.")
SLOT_USE = _gauge("kv_cache_usage_perc", "Slots in use; 1 means all of them.")
NODES = _gauge("tree_nodes", "Tree nodes per sequence in the last decode step; 1 is plain decoding.")
MODEL = _gauge("model_info", "1 for the weights that new requests get, 0 for those served before.", "version")

PROMPT_TOKENS = _counter("prompt_tokens", "Prompt tokens prefilled; those from the prefix cache are not.")
TOKENS = _counter("generation_tokens", "Tokens given to clients.")
CACHE_QUERIES = _counter("prefix_cache_queries", "Prompt tokens of finished requests.")
CACHE_HITS = _counter("prefix_cache_hits", "Those of prefix_cache_queries that came from the prefix cache.")
SUCCESS = _counter("request_success", "Requests answered to the end.", "finished_reason")
FAILURE = _counter("request_failure", "Requests taken and not answered to the end.", "reason")
HTTP_ERRORS = _counter(
    "http_errors", "Responses that are errors; an answer that fails later is a request_failure.", "status"
)
DRAFTS = _counter("spec_decode_num_drafts", "Verify steps, counted once for each sequence in them.")
DRAFT_TOKENS = _counter("spec_decode_num_draft_tokens", "Tree nodes verified, but for the roots.")
ACCEPTED = _counter("spec_decode_num_accepted_tokens", "Tokens that verify steps gave beyond one for each sequence.")
ACCEPTED_AT = _counter(
    "spec_decode_num_accepted_tokens_per_pos", "Accepted tokens by depth; position 0 is the first head's.", "position"
)

TTFT = _histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", _SECONDS)
ITL = _histogram("inter_token_latency_seconds", "Between outputs of a request, each of one step.", _STEP_SECONDS)
TPOT = _histogram("request_time_per_output_token_seconds", "Time per token after the first.", _STEP_SECONDS)
E2E = _histogram("e2e_request_latency_seconds", "From a request's arrival to its last token.", _SECONDS)
QUEUE = _histogram("request_queue_time_seconds", "Waiting for a slot.", _SECONDS)
PREFILL = _histogram("request_prefill_time_seconds", "Reading the prompt.", _SECONDS)
DECODE = _histogram("request_decode_time_seconds", "From the first token to the last.", _SECONDS)
PROMPT_SIZE = _histogram("request_prompt_tokens", "Prompt tokens of a finished request.", _TOKENS)
ANSWER_SIZE = _histogram("request_generation_tokens", "Tokens of a finished answer.", _TOKENS)
RATE = _histogram("request_acceleration_rate", "Tokens per verify step of a finished answer.", _RATES)
STEP = _histogram("step_time_seconds", "One forward of the engine.", _STEP_SECONDS, "phase")
