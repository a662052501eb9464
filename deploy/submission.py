"""One HTTP request becomes engine requests: its prompts × `n` choices, all of them or none. Knows model, loop and protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

from deploy.api.errors import bad_request
from deploy.api.protocol import GenerationRequest
from deploy.api.response_format import grammar_of
from deploy.api.translate import sampling_params
from deploy.choices import Choices
from deploy.engine_loop import Answer
from deploy.service import Service
from medusa.engine import Request as EngineRequest
from medusa.errors import PromptError
from pipelines.config import ServeSection


def num_choices(request: GenerationRequest, num_prompts: int, settings: ServeSection) -> int:
    """How many answers are asked for. ApiError where one request may not ask for so many, or an idle server not take them."""
    count = num_prompts * request.n
    idle_takes = settings.max_batch_size + settings.max_waiting
    limit = min(settings.max_choices, idle_takes)
    if count > limit:
        asked = f"n {request.n}" if num_prompts == 1 else f"n {request.n} for {num_prompts} prompts"
        field = "n" if request.n > 1 else request.prompt_field
        raise bad_request(f"{asked} asks for {count} answers; one request may ask for {limit}", param=field)
    return count


async def submit(
    request: GenerationRequest,
    prompts: Sequence[list[int]],
    *,
    service: Service,
    request_id: str,
    settings: ServeSection,
) -> Choices:
    """Queue every choice. ApiError where the request can never work, EngineOverloaded or EngineUnavailable where not now;
    nothing of it then stays queued."""
    vocab_size = service.model.backbone.vocab_size
    params = [
        sampling_params(request, room=service.context_length - len(ids), vocab_size=vocab_size, settings=settings)
        for ids in prompts
    ]
    grammar = await asyncio.to_thread(grammar_of, request.response_format)
    wanted = [
        EngineRequest(
            prompt_ids=ids,
            params=replace(each, choice=choice, grammar=grammar),
            request_id=f"{request_id}-{prompt}-{choice}",
        )
        for prompt, (ids, each) in enumerate(zip(prompts, params, strict=True))
        for choice in range(request.n)
    ]
    try:
        answers = await _all_or_none(wanted, service, request.stops)
    except PromptError as error:
        raise bad_request(str(error), param=request.prompt_field) from None
    return Choices(answers, num_prompt_tokens=sum(map(len, prompts)), timeout_s=settings.request_timeout_s)


async def _all_or_none(wanted: Sequence[EngineRequest], service: Service, stops: Sequence[str]) -> list[Answer]:
    answers: list[Answer] = []
    async with AsyncExitStack() as undo:
        for each in wanted:
            answers.append(await service.loop.submit(each, stop=stops, lane=service.lane, beside=len(answers)))
            undo.push_async_callback(answers[-1].aclose)
        undo.pop_all()
    return answers
