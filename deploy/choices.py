"""The answers to one HTTP request, read together while they come. Knows pieces and response objects; knows no routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel

from deploy.api import errors
from deploy.api.accounting import running_usage
from deploy.api.errors import ApiError
from deploy.api.protocol import UsageIn
from deploy.api.replies import Reply, Text
from deploy.api.streaming import DONE, event
from deploy.engine_loop import Answer, Piece
from deploy.refusals import as_api_error
from medusa.engine import Completion
from medusa.errors import MedusaError


class Choices:
    """Several answers as one. They end together: closing it, read or unread, cancels whatever of them still runs.

    Their prompts have `num_prompt_tokens` together. `timeout_s` runs from its making; what has not ended by then is
    cancelled.
    """

    def __init__(self, answers: Sequence[Answer], *, num_prompt_tokens: int, timeout_s: float) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.num_tokens = 0  # that came so far
        self._answers = answers
        self._timeout_s = timeout_s
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._completions: dict[int, Completion] = {}

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def completions(self) -> list[Completion]:
        """Those that have ended, in the order of the choices."""
        return [self._completions[index] for index in sorted(self._completions)]

    @property
    def ended(self) -> bool:
        return len(self._completions) == len(self._answers)

    @property
    def summary(self) -> dict[str, Any]:
        """What an access log tells; it says nothing of texts."""
        return {
            "choices": len(self),
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "finish_reasons": [completion.finish_reason for completion in self.completions],
        }

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece]]:
        """(index, piece) of all answers, in the order in which they come. ApiError after the time limit.

        An answer's next piece is asked for when its last was taken, so a slow reader stays one for the engine loop.
        """
        reads = {asyncio.ensure_future(anext(answer)): index for index, answer in enumerate(self._answers)}
        try:
            while reads:
                left_s = self._deadline - asyncio.get_running_loop().time()
                done, _ = await asyncio.wait(reads, timeout=max(left_s, 0), return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    for answer in self._answers:
                        answer.cancel("timeout")
                    raise errors.timed_out(f"the answer took longer than the {self._timeout_s:g} s that a request may")
                for read in sorted(done, key=reads.__getitem__):
                    index, piece = reads.pop(read), read.result()
                    self.num_tokens += len(piece.token_ids)
                    if piece.completion is None:
                        reads[asyncio.ensure_future(anext(self._answers[index]))] = index
                    else:
                        self._completions[index] = piece.completion
                    yield index, piece
        finally:
            for read in reads:
                read.cancel()
            await asyncio.gather(*reads, return_exceptions=True)
            await self.aclose()

    async def aclose(self) -> None:
        for answer in self._answers:
            await answer.aclose()


async def collect(choices: Choices, reply: Reply) -> BaseModel:
    """The whole answer, once all of it is there."""
    texts = [Text() for _ in range(len(choices))]
    async with aclosing(choices.pieces()) as pieces:
        async for index, piece in pieces:
            texts[index].text += piece.text
            texts[index].scored += piece.logprobs
    return reply.whole(texts, choices.completions)


async def events(choices: Choices, reply: Reply, *, usage: UsageIn) -> AsyncGenerator[str]:
    """The answer as server-sent events: one per step that completed text, so the first token leaves at once.

    Headers have left when a step fails: the error travels as an event, and the stream ends without [DONE].
    """
    async with aclosing(choices.pieces()) as pieces:
        try:
            for index in range(len(choices)):
                opening = reply.opening(index, **_so_far(choices, usage))
                if opening is not None:
                    yield _event(opening, usage)
            async for index, piece in pieces:
                for chunk in _chunks(index, piece, choices, reply, usage):
                    yield _event(chunk, usage)
        except ApiError as error:
            yield error.event()
        except MedusaError as error:
            yield as_api_error(error).event()
        else:
            if usage is not UsageIn.NONE:
                yield event(reply.accounting(choices.completions))
            yield DONE


def _chunks(index: int, piece: Piece, choices: Choices, reply: Reply, usage: UsageIn) -> Iterator[BaseModel]:
    so_far = _so_far(choices, usage)
    if piece.text or piece.logprobs:
        yield reply.step(index, Text(text=piece.text, scored=list(piece.logprobs)), **so_far)
    if piece.completion is not None:
        at_the_end = reply.metrics(choices.completions) if choices.ended and usage is UsageIn.NONE else {}
        yield reply.closing(index, piece.completion.finish_reason, **so_far, **at_the_end)


def _so_far(choices: Choices, usage: UsageIn) -> dict[str, Any]:
    """What each chunk tells beside its text."""
    if usage is not UsageIn.EVERY_CHUNK:
        return {}
    return {"usage": running_usage(choices.num_prompt_tokens, choices.num_tokens)}


def _event(chunk: BaseModel, usage: UsageIn) -> str:
    """Where usage was asked for, it is null in the chunks that do not tell it; else there is no such field."""
    return event(chunk, leave_out={"usage"} if usage is UsageIn.NONE else set())
