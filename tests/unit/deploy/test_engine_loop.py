"""The loop adds threads and clients to the engine and changes no answer; what fails or leaves costs nobody else."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import aclosing

import pytest

from deploy import engine_loop, reader
from deploy.engine_loop import EngineLoop, Piece
from deploy.errors import EngineOverloaded, EngineUnavailable, SlowReader
from medusa import Model, PromptError, SamplingParams
from medusa.engine import Delta, Engine, Request
from tests.unit.deploy.conftest import BATCH, CONTEXT, PacedEngine, wait_until

PROMPTS = ["Hello", "Why is the sky blue?", "A", "Count to ten, slowly.", "x y z", "The last of them"]


class Breaking(Engine):
    """Fails in a step while `failures` are left."""

    failures = 0

    def step(self) -> list[Delta]:
        if type(self).failures:
            type(self).failures -= 1
            raise RuntimeError("the device is gone")
        return super().step()


@pytest.fixture
def breaking() -> type[Breaking]:
    return type("Breaking", (Breaking,), {})


def request(model: Model, text: str = "Hello", request_id: str = "0", max_tokens: int = 24) -> Request:
    return Request(prompt_ids=model.encode(text), params=SamplingParams(max_tokens=max_tokens), request_id=request_id)


async def collect(loop: EngineLoop, asked: Request, stop: tuple[str, ...] = ()) -> list[Piece]:
    return [piece async for piece in await loop.submit(asked, stop=stop)]


def test_concurrent_answers_equal_solo_answers(model: Model, make_loop: Callable) -> None:
    async def ask_all(loop: EngineLoop) -> list[list[Piece]]:
        return await asyncio.gather(*(collect(loop, request(model, text, text)) for text in PROMPTS))

    with make_loop() as loop:
        answers = asyncio.run(ask_all(loop))
    assert len(PROMPTS) > BATCH
    for text, pieces in zip(PROMPTS, answers, strict=True):
        alone = model.generate(text, max_tokens=24)
        assert [token for piece in pieces for token in piece.token_ids] == alone.token_ids
        assert "".join(piece.text for piece in pieces) == alone.text
        assert pieces[-1].completion is not None
        assert pieces[-1].completion.finish_reason == alone.finish_reason
        assert all(piece.completion is None for piece in pieces[:-1])


def test_a_stop_string_ends_the_answer_before_it(model: Model, make_loop: Callable) -> None:
    whole = model.generate("Hello", max_tokens=24).text
    stop = whole[5:8]
    with make_loop() as loop:
        pieces = asyncio.run(collect(loop, request(model), stop=(stop,)))
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].completion is not None
    assert pieces[-1].completion.finish_reason == "stop"


def test_an_answer_closed_unread_is_cancelled(model: Model, make_loop: Callable) -> None:
    async def leave(loop: EngineLoop) -> None:
        await (await loop.submit(request(model, max_tokens=200))).aclose()

    with make_loop(PacedEngine) as loop:
        asyncio.run(leave(loop))
        wait_until(lambda: loop.num_in_flight == 0 and not loop.lane.engine.has_work, timeout_s=1)


def test_leaving_an_answer_frees_its_slot(model: Model, make_loop: Callable) -> None:
    async def leave(loop: EngineLoop) -> None:
        async with aclosing(await loop.submit(request(model, max_tokens=200))) as pieces:
            async for _ in pieces:
                break

    with make_loop(PacedEngine) as loop:
        asyncio.run(leave(loop))
        wait_until(lambda: loop.num_in_flight == 0 and not loop.lane.engine.has_work, timeout_s=1)


def test_a_bad_prompt_fails_alone_and_at_once(model: Model, make_loop: Callable) -> None:
    async def ask(loop: EngineLoop) -> list[Piece]:
        good = asyncio.ensure_future(collect(loop, request(model)))
        with pytest.raises(PromptError, match="exceed the context"):
            await loop.submit(request(model, request_id="1", max_tokens=CONTEXT))
        with pytest.raises(PromptError, match="empty"):
            await loop.submit(Request(prompt_ids=[], request_id="2"))
        return await good

    with make_loop() as loop:
        assert asyncio.run(ask(loop))[-1].completion is not None
        assert loop.num_in_flight == 0


def test_too_many_requests_are_refused_at_once(model: Model, make_loop: Callable) -> None:
    async def flood(loop: EngineLoop) -> None:
        answers = [await loop.submit(request(model, request_id=str(i))) for i in range(BATCH + 1)]
        with pytest.raises(EngineOverloaded, match=f"{BATCH + 1} requests"):
            await loop.submit(request(model, request_id="more"))
        for answer in answers:
            assert [piece async for piece in answer][-1].completion is not None
        assert await collect(loop, request(model, request_id="later"))

    with make_loop(PacedEngine, max_waiting=1) as loop:
        asyncio.run(flood(loop))


def test_a_failed_step_costs_its_requests_and_no_later_one(
    model: Model, make_loop: Callable, breaking: type[Breaking]
) -> None:
    breaking.failures = 1
    with make_loop(breaking) as loop:
        with pytest.raises(EngineUnavailable, match="failed on this request"):
            asyncio.run(collect(loop, request(model)))
        loop.check_health()
        pieces = asyncio.run(collect(loop, request(model)))
    assert [t for piece in pieces for t in piece.token_ids] == model.generate("Hello", max_tokens=24).token_ids


def test_a_broken_engine_is_not_asked_to_cancel(
    model: Model, make_loop: Callable, breaking: type[Breaking], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that is gone fails at every call: the readers must hear of it all the same."""

    def gone(self: Engine, request_id: str) -> bool:
        raise RuntimeError("the device is gone")

    async def ask(loop: EngineLoop) -> list[object]:
        asked = (collect(loop, request(model, request_id=str(i))) for i in range(3))
        return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), timeout=10)

    monkeypatch.setattr(breaking, "cancel", gone, raising=False)
    breaking.failures = 1
    with make_loop(breaking) as loop:
        answers = asyncio.run(ask(loop))
    assert any(isinstance(answer, EngineUnavailable) for answer in answers)


def test_what_waited_behind_a_failed_step_is_not_decoded_for_nobody(model: Model, make_loop: Callable) -> None:
    class BreakingSlowly(Engine):
        failures = 1

        def step(self) -> list[Delta]:
            if type(self).failures:
                type(self).failures -= 1
                time.sleep(0.2)
                raise RuntimeError("the device is gone")
            return super().step()

    async def ask(loop: EngineLoop) -> None:
        first = await loop.submit(request(model, request_id="first", max_tokens=200))
        await asyncio.sleep(0.05)  # its step is under way
        second = await loop.submit(request(model, request_id="second", max_tokens=200))
        for answer in (first, second):
            with pytest.raises(EngineUnavailable, match="failed"):
                await anext(answer)

    with make_loop(BreakingSlowly) as loop:
        asyncio.run(ask(loop))
        taken = threading.Event()
        loop._orders.put(taken.set)
        assert taken.wait(5)
        assert not loop.lane.engine.has_work


def test_step_after_step_failing_ends_the_loop_and_its_health(
    model: Model, make_loop: Callable, breaking: type[Breaking]
) -> None:
    breaking.failures = engine_loop.MAX_FAILED_STEPS
    with make_loop(breaking) as loop:
        for _ in range(engine_loop.MAX_FAILED_STEPS):
            with pytest.raises(EngineUnavailable):
                asyncio.run(collect(loop, request(model)))
        with pytest.raises(EngineUnavailable, match="not running"):
            loop.check_health()


def test_a_stuck_step_is_unhealthy(model: Model, make_loop: Callable) -> None:
    class Stuck(PacedEngine):
        pace_s = 0.5

    async def probe(loop: EngineLoop) -> None:
        async with aclosing(await loop.submit(request(model))):
            await asyncio.sleep(0.2)
            with pytest.raises(EngineUnavailable, match="in one step"):
                loop.check_health()

    with make_loop(Stuck, stall_after_s=0.1) as loop:
        asyncio.run(probe(loop))


def test_stop_ends_answers_in_flight_and_refuses_new_ones(model: Model, make_loop: Callable) -> None:
    async def stop_midway(loop: EngineLoop) -> None:
        pieces = await loop.submit(request(model, max_tokens=200))
        await anext(pieces)
        await asyncio.to_thread(loop.stop)
        with pytest.raises(EngineUnavailable, match="shutting down"):
            async for _ in pieces:
                pass
        with pytest.raises(EngineUnavailable):
            await loop.submit(request(model, request_id="late"))

    with make_loop(PacedEngine) as loop:
        asyncio.run(stop_midway(loop))
        loop.stop()


def test_a_slow_reader_is_cancelled(model: Model, make_loop: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_UNREAD_PIECES", 3)

    async def dawdle(loop: EngineLoop) -> None:
        pieces = await loop.submit(request(model, max_tokens=100))
        while loop.num_in_flight:
            await asyncio.sleep(0.01)
        for _ in range(3):
            await anext(pieces)
        with pytest.raises(SlowReader):
            await anext(pieces)

    with make_loop() as loop:
        asyncio.run(dawdle(loop))


def test_a_fault_in_one_text_ends_one_answer(model: Model, make_loop: Callable) -> None:
    async def ask(loop: EngineLoop) -> list[Piece]:
        good = asyncio.ensure_future(collect(loop, request(model, request_id="good")))
        await asyncio.sleep(0)
        pieces = await loop.submit(request(model, request_id="bad"))
        loop._readers["bad"].text._tokenizer = None
        with pytest.raises(EngineUnavailable, match="could not be decoded"):
            async for _ in pieces:
                pass
        return await good

    with make_loop(PacedEngine) as loop:
        pieces = asyncio.run(ask(loop))
    assert "".join(piece.text for piece in pieces) == model.generate("Hello", max_tokens=24).text
