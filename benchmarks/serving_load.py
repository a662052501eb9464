"""The two shapes of load: so many clients that ask one request after another, and arrivals that wait for nobody.

Knows when to ask; what asking is comes as a function. Everything is bounded in count and time.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from benchmarks.serving_client import Ending, Outcome

Ask = Callable[[int], Awaitable[Outcome]]  # the number of the request → how it ended

PAUSE_S = 0.25  # a client whose request failed does not ask again at once
MAX_OPEN = 4096  # requests that an open loop holds open at most


async def closed_loop(
    ask: Ask, *, clients: int, seconds: float, requests: int | None = None, stop: asyncio.Event | None = None
) -> list[Outcome]:
    """`clients` at a time, each asking again when answered, until `seconds` are over, `requests` were begun or `stop` is set.

    What has begun is read to its end. A refused client comes back when Retry-After says.
    """
    numbers = itertools.count()
    ended = stop or asyncio.Event()
    deadline = time.perf_counter() + seconds
    outcomes: list[Outcome] = []

    async def client() -> None:
        while time.perf_counter() < deadline and not ended.is_set():
            number = next(numbers)
            if requests is not None and number >= requests:
                return
            outcome = await ask(number)
            outcomes.append(outcome)
            if outcome.ending is not Ending.FINISHED:
                left = max(0.0, deadline - time.perf_counter())
                await _sleep(min(left, max(PAUSE_S, outcome.retry_after_s)), ended)

    await asyncio.gather(*(client() for _ in range(clients)))
    return outcomes


async def open_loop(
    ask: Ask, *, rate: float, seconds: float, seed: int = 0, max_open: int = MAX_OPEN
) -> tuple[list[Outcome], int]:
    """Poisson arrivals, `rate` a second for `seconds`, whatever happens to them; refused ones do not come back.

    Returns how each ended, and how many were not sent since `max_open` were open already (0 in a valid run). What `ask`
    raises ends the load and is raised.
    """
    draw = random.Random(seed)
    open_: set[asyncio.Task[Outcome]] = set()
    outcomes: list[Outcome] = []
    unsent = 0
    failed: list[BaseException] = []

    def ended(task: asyncio.Task[Outcome]) -> None:
        open_.discard(task)
        if task.cancelled():
            return
        if error := task.exception():
            failed.append(error)
        else:
            outcomes.append(task.result())

    began = time.perf_counter()
    arrival = draw.expovariate(rate)
    number = 0
    async with _awaited(open_):
        while arrival < seconds:
            await asyncio.sleep(max(0.0, began + arrival - time.perf_counter()))
            if failed:
                break
            if len(open_) < max_open:
                task = asyncio.ensure_future(ask(number))
                open_.add(task)
                task.add_done_callback(ended)
            else:
                unsent += 1
            number += 1
            arrival += draw.expovariate(rate)
    if failed:
        raise failed[0]
    return outcomes, unsent


@asynccontextmanager
async def _awaited(tasks: set[asyncio.Task[Outcome]]) -> AsyncIterator[None]:
    """All tasks have ended when the block has; an error ends them."""
    try:
        yield
        await asyncio.gather(*tasks)
        await asyncio.sleep(0)  # their callbacks
    finally:
        for task in tasks:
            task.cancel()


async def _sleep(seconds: float, ended: asyncio.Event) -> None:
    try:
        await asyncio.wait_for(ended.wait(), timeout=seconds)
    except TimeoutError:
        return
