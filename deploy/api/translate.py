"""From the protocol's words to the engine's: pure functions. Knows both vocabularies; does no I/O."""

from __future__ import annotations

import secrets

from deploy.api.errors import bad_request
from deploy.api.protocol import GenerationRequest
from medusa.config import SamplingParams
from pipelines.config import ServeSection


def sampling_params(
    request: GenerationRequest, *, room: int, vocab_size: int, settings: ServeSection
) -> SamplingParams:
    """How to decode `request`; `room` is how many tokens the context leaves for the answer, the default limit.

    A request without a seed gets a random one: two clients who ask the same must not get the same sample. What it
    does not say of acceptance, the server's `settings` say. Greedy acceptance without a temperature is temperature 0.
    Its response_format, which takes long to compile, is left out. ApiError for settings that contradict each other.
    """
    _check_room(request, room)
    greedy = request.acceptance == "greedy" and "temperature" not in request.model_fields_set
    bias = _logit_bias(request, vocab_size)
    try:
        return SamplingParams(
            max_tokens=request.limit or room,
            temperature=0.0 if greedy else request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=request.seed if request.seed is not None else secrets.randbits(63),
            acceptance=request.acceptance or settings.acceptance,
            epsilon=request.epsilon if request.epsilon is not None else settings.epsilon,
            delta=request.delta if request.delta is not None else settings.delta,
            tree_nodes=request.tree_nodes,
            ignore_eos=request.ignore_eos,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=bias,
            logprobs=request.num_logprobs,
        )
    except ValueError as error:  # two that contradict each other: each by itself was checked with the request
        raise bad_request(str(error), param="acceptance") from None


def _check_room(request: GenerationRequest, room: int) -> None:
    what = request.prompt_field
    if room < 1:
        raise bad_request(
            f"the {what} is {1 - room} tokens too long for the context; shorten it",
            param=what,
            code="context_length_exceeded",
        )
    if request.limit is not None and request.limit > room:
        raise bad_request(
            f"{request.limit_field} {request.limit} is more than the {room} tokens that the context leaves after the {what}",
            param=request.limit_field,
            code="context_length_exceeded",
        )


def _logit_bias(request: GenerationRequest, vocab_size: int) -> dict[int, float]:
    bias = {int(token): value for token, value in request.logit_bias.items()}
    odd = next((token for token in bias if token >= vocab_size), None)
    if odd is not None:
        raise bad_request(
            f"logit_bias names token id {odd}; the vocabulary has ids 0 to {vocab_size - 1}", param="logit_bias"
        )
    return bias
