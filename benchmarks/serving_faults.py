"""Faults under load: `python -m benchmarks.serving_faults --victim replica --malformed 10000`.

Starts our server, kills a part of it while clients stream, and tells how their requests ended and when new ones were
served again; then sends malformed requests and tells whether one was answered 500 and what was left behind. A server that
is killed as a whole is started again at once, as a supervisor would. Bounded in count and time; loopback only.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer

from benchmarks.command import RESULTS, console, run_command
from benchmarks.machine import describe_machine
from benchmarks.prompts import Prompt
from benchmarks.report import Grid, save
from benchmarks.serving import asking, built_in, reference
from benchmarks.serving_client import Ending, Endpoint, Outcome, ask, first_model, session
from benchmarks.serving_figures import Answers
from benchmarks.serving_load import closed_loop
from benchmarks.serving_malformed import Tally, attacks, send_all
from benchmarks.serving_memory import Memory, sample, watched
from benchmarks.serving_page import collect
from benchmarks.serving_servers import Server, ours, started

# What Ray calls the processes; the node is all of them.
VICTIMS = {"replica": "ray::ServeReplica", "controller": "ray::ServeController", "proxy": "ray::ProxyActor", "node": ""}
CLEAN = (Ending.FINISHED, Ending.REFUSED, Ending.ERROR, Ending.CUT)  # what a client can tell from a whole answer
PROBE_EVERY_S = 0.25
QUIET_S = 5.0  # before the kill, and after the recovery
SETTLE_S = 5.0  # for what malformed requests have left running


@dataclass(frozen=True, kw_only=True)
class Kill:
    """What a kill did. `in_flight` counts how the requests ended that were open at it.

    `recovery_s` runs from the kill to the end of the first answer that was asked for after it; `last_failure_s` to the
    beginning of the last request that failed. `unclean` requests looked whole and were not, or never ended.
    """

    victim: str
    num_requests: int
    in_flight: dict[str, int]
    later: dict[str, int]
    unclean: int
    answers: Answers
    recovery_s: float | None
    last_failure_s: float

    def row(self) -> list[str]:
        ends = [
            ", ".join(f"{n} {kind}" for kind, n in sorted(c.items())) or "none" for c in (self.in_flight, self.later)
        ]
        recovered = "not" if self.recovery_s is None else f"{self.recovery_s:.1f}"
        rest = (self.unclean, self.answers.identical, self.answers.differing, self.answers.mixed)
        return [self.victim, *ends, recovered, f"{self.last_failure_s:.1f}", *map(str, rest)]


def main(
    victim: Annotated[
        list[str] | None, typer.Option(help="replica, controller, proxy, node; again; default none")
    ] = None,
    malformed: Annotated[int, typer.Option(min=0, max=100_000, help="how many malformed requests")] = 0,
    clients: Annotated[int, typer.Option(min=1, max=512, help="that stream while something is killed")] = 8,
    limit_s: Annotated[float, typer.Option(min=1, max=600, help="longest wait for a recovery")] = 180.0,
    max_tokens: Annotated[int, typer.Option(min=2)] = 64,
    backbone: Annotated[str, typer.Option()] = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="float32 makes every differing answer a fault")] = "float32",
    setting: Annotated[list[str] | None, typer.Option("--set", help="section.key=value for the server; again")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    output: Annotated[Path, typer.Option(help="folder of the .md and .json")] = RESULTS,
) -> None:
    """Kill parts of a server under load, and send it what it should refuse."""
    machine = describe_machine("benchmarks.serving_faults")
    if unknown := set(victim or ()) - set(VICTIMS):
        raise ValueError(f"no victim {sorted(unknown)[0]!r}; there are {', '.join(VICTIMS)}")
    if not (victim or malformed):
        raise ValueError("nothing to do; give --victim or --malformed")
    kills, grids = [], []
    figures: dict[str, Any] = {}
    prompts = built_in(12)
    with tempfile.TemporaryDirectory(prefix="serving-") as folder:
        launch = ours(workdir=Path(folder), dtype=dtype, settings=[f"backbone.name={backbone}", *(setting or ())])
        with started(launch, folder=Path(folder)) as server:
            for name in victim or ():
                kills.append(asyncio.run(kill_under_load(server, name, prompts, clients, max_tokens, limit_s=limit_s)))
                console.print(", ".join(kills[-1].row()), highlight=False)
            if malformed:
                siege = asyncio.run(besiege(server.url, server.pid, malformed, prompts, max_tokens, seed=seed))
                figures["malformed"] = asdict(siege)
                grids.append(siege.grid())
    if kills:
        figures["kills"] = [asdict(kill) for kill in kills]
        grids.insert(0, _kills_grid(kills))
    for grid in grids:
        grid.show(console)
    settings: dict[str, object] = {
        "backbone": Path(backbone).name, "dtype": dtype, "clients": clients, "max_tokens": max_tokens, "seed": seed,
        "malformed": malformed,
    }  # fmt: skip
    stem = f"serving-{'faults' if kills else 'malformed'}-{datetime.now(UTC):%Y%m%d-%H%M}"
    page = save(
        output,
        stem,
        title="Serving under faults",
        machine=machine,
        settings=settings,
        grids=grids,
        figures=dict(figures),
    )
    console.print(f"saved {page} and {collect(output)}")


async def kill_under_load(
    server: Server, victim: str, prompts: Sequence[Prompt], clients: int, max_tokens: int, *, limit_s: float
) -> Kill:
    """SIGKILL `victim` while `clients` stream, and go on until new requests are answered, at most `limit_s` longer."""
    async with session() as http:
        endpoint = Endpoint(
            url=server.url, model=await first_model(http, server.url, {}), max_tokens=max_tokens, timeout_s=limit_s
        )
        expected = await reference(http, endpoint, prompts)
        stop = asyncio.Event()
        load = asyncio.ensure_future(
            closed_loop(asking(http, endpoint, prompts), clients=clients, seconds=2 * limit_s, stop=stop)
        )
        await asyncio.sleep(QUIET_S)
        killed = time.perf_counter()
        if VICTIMS[victim]:
            os.kill(server.find(VICTIMS[victim]), signal.SIGKILL)
        else:
            server.kill()
            server.restart()
        recovered = await _first_answer(http, endpoint, prompts[0], until=killed + limit_s)
        await asyncio.sleep(QUIET_S)
        stop.set()
        outcomes = await load
    return _told(victim, outcomes, expected, killed=killed, recovered=recovered)


async def _first_answer(
    http: aiohttp.ClientSession, endpoint: Endpoint, prompt: Prompt, *, until: float
) -> float | None:
    """When a short request was first answered again; None where it was not."""
    short = replace(endpoint, max_tokens=2, timeout_s=30.0)
    while time.perf_counter() < until:
        outcome = await ask(http, short, prompt)
        if outcome.ending is Ending.FINISHED:
            return outcome.ended
        await asyncio.sleep(PROBE_EVERY_S)
    return None


def _told(
    victim: str, outcomes: list[Outcome], expected: dict[str, str], *, killed: float, recovered: float | None
) -> Kill:
    open_then = [one for one in outcomes if one.began <= killed < one.ended]
    later = [one for one in outcomes if one.began > killed]
    failed = [one.began for one in later if one.ending not in (Ending.FINISHED, Ending.REFUSED)]
    return Kill(
        victim=victim,
        num_requests=len(outcomes),
        in_flight=_endings(open_then),
        later=_endings(later),
        unclean=sum(one.ending not in CLEAN for one in outcomes),
        answers=Answers.of(outcomes, expected),
        recovery_s=None if recovered is None else recovered - killed,
        last_failure_s=max(failed, default=killed) - killed,
    )


def _endings(outcomes: list[Outcome]) -> dict[str, int]:
    return dict(Counter(one.ending.value for one in outcomes))


def _kills_grid(kills: Sequence[Kill]) -> Grid:
    columns = (
        "SIGKILL", "open at the kill ended", "begun after it ended", "served again after s", "last failure began after s",
        "unclean", "identical", "differing", "mixed",
    )  # fmt: skip
    return Grid(title="Killed under load", columns=columns, rows=[kill.row() for kill in kills])


@dataclass(frozen=True, kw_only=True)
class Siege:
    """What malformed requests did, and what they left: `slots_s` is how long a full batch of good requests then took,
    `slots_before_s` before them."""

    tally: Tally
    seconds: float
    memory: Memory | None
    sockets_left: int
    answers: Answers
    refused_after: int
    slots_before_s: float
    slots_s: float

    def grid(self) -> Grid:
        m, t = self.memory, self.tally
        rows = [
            ["sent, in seconds", f"{t.sent}, {self.seconds:.0f}"],
            ["answered 5xx or not in OpenAI's form", f"{t.bad} {'; '.join(t.first_bad)}".strip()],
            ["not answered within the limit", str(t.timed_out)],
            ["RSS MiB before → after, growth in the later half", "–" if m is None else
             f"{m.before_mib:.0f} → {m.after_mib:.0f}, {m.growth_mib:+.1f} ({m.largest_growth_mib:+.1f})"],
            ["sockets left", str(self.sockets_left)],
            ["good requests afterwards: identical, differing, mixed, refused", ", ".join(
                map(str, (self.answers.identical, self.answers.differing, self.answers.mixed, self.refused_after)))],
            ["a full batch of good requests, s before → after", f"{self.slots_before_s:.1f} → {self.slots_s:.1f}"],
            *([f"status of {kind}", str(count)] for kind, count in sorted(t.statuses.items())),
        ]  # fmt: skip
        return Grid(title="Malformed requests", columns=("what", "found"), rows=rows)


async def besiege(
    url: str, pid: int | None, count: int, prompts: Sequence[Prompt], max_tokens: int, *, seed: int, batch: int = 8
) -> Siege:
    """Send `count` malformed requests; compare what the server holds and how it answers before and after.

    A tenth of them go first and are counted, but not as growth: caches fill once.
    """
    async with session() as http:
        endpoint = Endpoint(url=url, model=await first_model(http, url, {}), max_tokens=max_tokens)
        expected = await reference(http, endpoint, prompts)
        good = asking(http, endpoint, prompts)

        async def full_batch() -> tuple[list[Outcome], float]:
            began = time.perf_counter()
            return await closed_loop(good, clients=batch, seconds=300, requests=batch), time.perf_counter() - began

        _, before_s = await full_batch()
        wrong = attacks(count, model=endpoint.model, seed=seed)
        began = time.perf_counter()
        replies = await send_all(url, wrong[: len(wrong) // 10])
        sockets = sample(pid).sockets if pid else 0
        async with watched(pid, every_s=0.5) as samples:
            replies += await send_all(url, wrong[len(wrong) // 10 :])
            seconds = time.perf_counter() - began
            await asyncio.sleep(SETTLE_S)
        left = sample(pid).sockets - sockets if pid else 0
        outcomes, after_s = await full_batch()
    return Siege(
        tally=Tally.of(replies), seconds=seconds, memory=Memory.of(samples) if samples else None, sockets_left=left,
        answers=Answers.of(outcomes, expected), refused_after=sum(one.ending is not Ending.FINISHED for one in outcomes),
        slots_before_s=before_s, slots_s=after_s,
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main)
