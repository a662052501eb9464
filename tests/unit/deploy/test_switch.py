"""A switch changes who answers and nothing else: no request moves, waits for the other version, or is lost."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable

import pytest

from deploy.engine_loop import EngineLoop, Lane, Piece
from deploy.errors import EngineOverloaded, EngineUnavailable
from medusa import Model, SamplingParams
from medusa.engine import Delta, Engine, Request
from tests.unit.deploy.conftest import BATCH, CONTEXT, PacedEngine, wait_until

PROMPTS = ["Hello", "Why is the sky blue?", "A", "Count to ten, slowly."]


def request(model: Model, text: str = "Hello", request_id: str = "0", max_tokens: int = 24) -> Request:
    return Request(prompt_ids=model.encode(text), params=SamplingParams(max_tokens=max_tokens), request_id=request_id)


async def rest(answer: object) -> list[Piece]:
    return [piece async for piece in answer]  # type: ignore[attr-defined]


def engine_of(model: Model, kind: type[Engine] = PacedEngine) -> Callable[[], Engine]:
    return lambda: kind(model.backbone, model.heads, tree=model.tree, max_batch_size=BATCH, context_length=CONTEXT)


def switch(loop: EngineLoop, model: Model, kind: type[Engine] = PacedEngine) -> None:
    loop.switch(Lane(make_engine=engine_of(model, kind), tokenizer=model.backbone.tokenizer))


def tokens(pieces: list[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.token_ids]


def test_running_requests_end_on_the_old_engine_and_new_ones_begin_on_the_new(
    model: Model, other: Model, make_loop: Callable
) -> None:
    """Two backbones: a request that changed engines midway, or a cache that did, would answer in neither's words."""
    assert model.generate("Hello", max_tokens=40).token_ids != other.generate("Hello", max_tokens=40).token_ids

    async def ask(loop: EngineLoop) -> tuple[list[list[Piece]], list[list[Piece]]]:
        first = [await loop.submit(request(model, text, f"old-{text}", 40)) for text in PROMPTS]
        opening = [await anext(answer) for answer in first]
        await asyncio.to_thread(switch, loop, other)
        second = [await loop.submit(request(other, text, f"new-{text}", 40)) for text in PROMPTS]
        assert loop.load.running > 0
        both = await asyncio.gather(*map(rest, first), *map(rest, second))
        old = [[piece, *pieces] for piece, pieces in zip(opening, both, strict=False)]
        return old, both[len(PROMPTS) :]

    with make_loop(PacedEngine) as loop:
        old, new = asyncio.run(ask(loop))
        wait_until(lambda: loop._lanes == [loop.lane])
    for text, before, after in zip(PROMPTS, old, new, strict=True):
        assert tokens(before) == model.generate(text, max_tokens=40).token_ids
        assert tokens(after) == other.generate(text, max_tokens=40).token_ids


def test_both_engines_are_stepped_in_turn(model: Model, make_loop: Callable) -> None:
    async def ask(loop: EngineLoop) -> list[str]:
        order: list[str] = []

        async def read(name: str, answer: object) -> None:
            async for _ in answer:  # type: ignore[attr-defined]
                order.append(name)

        old = await loop.submit(request(model, request_id="old", max_tokens=200))
        await anext(old)
        switch(loop, model)
        new = await loop.submit(request(model, request_id="new", max_tokens=60))
        await asyncio.gather(read("old", old), read("new", new))
        return order

    with make_loop(PacedEngine) as loop:
        order = asyncio.run(ask(loop))
    begins, ends = order.index("new"), len(order) - order[::-1].index("new")
    assert abs(order[begins:ends].count("old") - order.count("new")) <= 2


def test_a_request_prepared_for_the_version_before_is_answered_by_it(
    model: Model, other: Model, make_loop: Callable
) -> None:
    async def ask(loop: EngineLoop) -> list[Piece]:
        before = loop.lane
        switch(loop, other)
        wait_until(lambda: loop._lanes == [loop.lane])
        assert before is not loop.lane
        return await rest(await loop.submit(request(model), lane=before))

    with make_loop() as loop:
        assert tokens(asyncio.run(ask(loop))) == model.generate("Hello", max_tokens=24).token_ids
        wait_until(lambda: loop._lanes == [loop.lane])


def test_the_old_engine_is_dropped_after_its_last_request(model: Model, make_loop: Callable) -> None:
    async def ask(loop: EngineLoop) -> weakref.ref[Engine]:
        answer = await loop.submit(request(model, max_tokens=60))
        await anext(answer)
        old = weakref.ref(loop.lane.engine)
        switch(loop, model)
        assert old() is not None
        await rest(answer)
        return old

    with make_loop(PacedEngine) as loop:
        old = asyncio.run(ask(loop))
        wait_until(lambda: len(loop._lanes) == 1)
        gc.collect()
        assert old() is None


def test_an_engine_that_cannot_be_made_leaves_the_old_one_serving(model: Model, make_loop: Callable) -> None:
    def broken() -> Engine:
        raise RuntimeError("out of memory")

    with make_loop() as loop:
        before = loop.lane
        with pytest.raises(RuntimeError, match="out of memory"):
            loop.switch(Lane(make_engine=broken, tokenizer=model.backbone.tokenizer))
        assert loop.lane is before
        pieces = asyncio.run(_ask_one(loop, model))
    assert tokens(pieces) == model.generate("Hello", max_tokens=24).token_ids


async def _ask_one(loop: EngineLoop, model: Model) -> list[Piece]:
    return await rest(await loop.submit(request(model)))


def test_a_step_that_fails_costs_the_requests_of_its_own_engine_alone(model: Model, make_loop: Callable) -> None:
    class FailsLater(PacedEngine):
        failing = False

        def step(self) -> list[Delta]:
            if type(self).failing:
                type(self).failing = False
                raise RuntimeError("the device is gone")
            return super().step()

    async def ask(loop: EngineLoop) -> list[Piece]:
        old = await loop.submit(request(model, request_id="old", max_tokens=200))
        await anext(old)
        switch(loop, model)
        new = await loop.submit(request(model, request_id="new"))
        FailsLater.failing = True
        with pytest.raises(EngineUnavailable, match="failed on this request"):
            await rest(old)
        return await rest(new)

    with make_loop(FailsLater) as loop:
        pieces = asyncio.run(ask(loop))
        loop.check_health()
    assert tokens(pieces) == model.generate("Hello", max_tokens=24).token_ids


def test_draining_ends_what_runs_and_refuses_what_comes(model: Model, make_loop: Callable) -> None:
    async def ask(loop: EngineLoop) -> list[Piece]:
        answer = await loop.submit(request(model, max_tokens=60))
        await anext(answer)
        drained = asyncio.create_task(asyncio.to_thread(loop.drain, 30))
        while not loop._draining:
            await asyncio.sleep(0.001)
        with pytest.raises(EngineUnavailable, match="shutting down"):
            await loop.submit(request(model, request_id="late"))
        pieces = await rest(answer)
        assert await drained
        loop.check_health()  # Serve must not take a draining replica for a broken one
        return pieces

    with make_loop(PacedEngine) as loop:
        pieces = asyncio.run(ask(loop))
    assert pieces[-1].completion is not None
    assert pieces[-1].completion.finish_reason == "length"


def test_draining_says_when_it_took_too_long(model: Model, make_loop: Callable) -> None:
    async def ask(loop: EngineLoop) -> bool:
        await loop.submit(request(model, max_tokens=200))
        return await asyncio.to_thread(loop.drain, 0.05)

    with make_loop(PacedEngine) as loop:
        assert asyncio.run(ask(loop)) is False


def test_a_stuck_loop_tells_its_clients_at_once(model: Model, make_loop: Callable) -> None:
    released = threading.Event()

    class Stuck(Engine):
        def step(self) -> list[Delta]:
            released.wait(20)
            return super().step()

    async def ask(loop: EngineLoop) -> None:
        answer = await loop.submit(request(model))
        await asyncio.sleep(0.2)
        with pytest.raises(EngineUnavailable, match="in one step"):
            loop.check_health()
        with pytest.raises(EngineUnavailable, match="in one step"):
            await asyncio.wait_for(anext(answer), timeout=5)
        with pytest.raises(EngineUnavailable, match="in one step"):
            await loop.submit(request(model, request_id="late"))

    with make_loop(Stuck, stall_after_s=0.1) as loop:
        try:
            asyncio.run(ask(loop))
        finally:
            released.set()


def test_a_request_that_would_wait_too_long_is_refused_at_once(model: Model, make_loop: Callable) -> None:
    async def ask(loop: EngineLoop) -> None:
        assert await rest(await loop.submit(request(model, request_id="first", max_tokens=60)))
        running = [await loop.submit(request(model, request_id=str(i), max_tokens=60)) for i in range(BATCH)]
        began = time.monotonic()
        with pytest.raises(EngineOverloaded, match="would wait about") as refused:
            await loop.submit(request(model, request_id="more"))
        assert time.monotonic() - began < 0.2
        assert refused.value.retry_after_s >= 1
        for answer in running:
            await answer.aclose()
        wait_until(lambda: loop.num_in_flight == 0)
        assert await rest(await loop.submit(request(model, request_id="more")))

    with make_loop(PacedEngine, max_wait_s=0.01) as loop:
        asyncio.run(ask(loop))


def test_load_counts_slots_and_queue(model: Model, make_loop: Callable) -> None:
    async def ask(loop: EngineLoop) -> None:
        answers = [await loop.submit(request(model, request_id=str(i), max_tokens=100)) for i in range(BATCH + 2)]
        await asyncio.gather(*(anext(answer) for answer in answers[:BATCH]))
        load = loop.load
        assert (load.running, load.waiting, load.slots) == (BATCH, 2, BATCH)
        for answer in answers:
            await answer.aclose()
        wait_until(lambda: loop.load.running + loop.load.waiting == 0)

    with make_loop(PacedEngine) as loop:
        assert loop.load.running == 0
        asyncio.run(ask(loop))
