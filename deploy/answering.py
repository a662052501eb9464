"""From a validated request to its response, whole or streamed, in either protocol. Knows model, loop and replies; no routes."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from deploy.api.errors import bad_request
from deploy.api.protocol import GenerationRequest
from deploy.api.replies import Reply
from deploy.api.streaming import EventStream, unless_disconnected
from deploy.api.token_text import TokenTexts
from deploy.choices import collect, events
from deploy.request_log import note
from deploy.service import Service
from deploy.submission import num_choices, submit
from medusa.errors import PromptError
from medusa.generate import Model
from pipelines.config import ServeSection

STREAM_GRACE_S = 10.0  # when a request's time is up, its stream still has to say so to a slow reader


class Answering:
    """What both generating routes do with a request and its prompts: chat messages, texts, or token ids."""

    def __init__(self, service: Service, settings: ServeSection) -> None:
        self.service = service
        self._settings = settings
        self._tokens = TokenTexts(service.model.backbone.tokenizer)

    async def answer(
        self, request: Request, body: GenerationRequest, prompts: Sequence[Any], reply_class: type[Reply]
    ) -> Response:
        """ApiError or MedusaError where the request is refused, before anything of a stream is sent."""
        service, settings = self.service, self._settings
        service.check_name(body.model)
        if settings.log_prompts:
            note(request, lambda: {"prompts": list(prompts)})
        request_id = f"{reply_class.id_prefix}-{uuid.uuid4().hex}"
        # Before the work of megabytes of text: what would be refused whatever they say.
        service.loop.check_room(num_choices(body, len(prompts), settings))
        choices = await submit(
            body,
            await self._encode(body, prompts),
            service=service,
            request_id=request_id,
            settings=settings,
        )
        note(request, lambda: {"id": request_id, "stream": body.stream, **choices.summary})
        reply = self._reply(body, request_id, reply_class)
        if body.stream:
            return EventStream(
                events(choices, reply, usage=body.usage_in),
                release=choices.aclose,
                timeout_s=settings.request_timeout_s + STREAM_GRACE_S,
            )
        whole = await unless_disconnected(collect(choices, reply), request)
        return Response(whole.model_dump_json(), media_type="application/json")

    async def _encode(self, body: GenerationRequest, prompts: Sequence[Any]) -> list[list[int]]:
        """In a thread: megabytes of text must not hold up the streams of others. ApiError names the field."""
        model = self.service.model
        try:
            return await asyncio.to_thread(lambda: [_token_ids(model, prompt) for prompt in prompts])
        except PromptError as error:
            raise bad_request(str(error), param=body.prompt_field) from None

    def _reply(self, body: GenerationRequest, request_id: str, reply_class: type[Reply]) -> Reply:
        service = self.service
        return reply_class(
            request_id=request_id,
            created=int(time.time()),
            model=service.name,
            fingerprint=service.fingerprint,
            n=body.n,
            tree_depth=service.model.tree.depth,
            tokens=self._tokens,
            with_logprobs=body.num_logprobs is not None,
        )


def _token_ids(model: Model, prompt: Any) -> list[int]:
    """Chat messages through the chat template, ids as they are; a text of its own is no turn of a chat."""
    if isinstance(prompt, str):
        return list(model.backbone.tokenizer(prompt)["input_ids"])
    return model.encode(prompt)
