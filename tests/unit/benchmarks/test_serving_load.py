"""Loops, figures and memory of a load test, on requests whose times are known."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.serving_client import Ending, Outcome
from benchmarks.serving_faults import _told
from benchmarks.serving_figures import TELLING_CHARACTERS, Answers, Figures
from benchmarks.serving_load import closed_loop, open_loop
from benchmarks.serving_memory import Memory, Sample, family, sample
from benchmarks.serving_page import collect
from benchmarks.serving_servers import Launch, started


def made(
    ending: Ending = Ending.FINISHED, *, prompt: str = "p", began: float = 0.0, ended: float = 1.0, **rest
) -> Outcome:
    return Outcome(ending=ending, prompt=prompt, began=began, ended=ended, **rest)


class Fake:
    """Answers after `seconds`, and remembers how many were open at once."""

    def __init__(self, seconds: float = 0.01, ending: Ending = Ending.FINISHED, retry_after_s: float = 0.0) -> None:
        self.seconds, self.ending, self.retry_after_s = seconds, ending, retry_after_s
        self.numbers: list[int] = []
        self.open = self.most_open = 0

    async def __call__(self, number: int) -> Outcome:
        self.numbers.append(number)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        began = time.perf_counter()
        await asyncio.sleep(self.seconds)
        self.open -= 1
        return made(self.ending, began=began, ended=time.perf_counter(), retry_after_s=self.retry_after_s)


def test_a_closed_loop_holds_its_clients_and_its_count() -> None:
    fake = Fake()
    outcomes = asyncio.run(closed_loop(fake, clients=3, seconds=30, requests=10))
    assert (len(outcomes), fake.numbers, fake.most_open) == (10, list(range(10)), 3)


def test_a_closed_loop_ends_in_time_and_reads_what_it_began() -> None:
    fake = Fake(seconds=0.05)
    outcomes = asyncio.run(closed_loop(fake, clients=2, seconds=0.12))
    assert len(outcomes) == len(fake.numbers) >= 4
    assert fake.open == 0


def test_a_refused_client_waits_as_it_was_told() -> None:
    fake = Fake(seconds=0, ending=Ending.REFUSED, retry_after_s=0.4)
    asyncio.run(closed_loop(fake, clients=1, seconds=0.6))
    assert len(fake.numbers) == 2


def test_an_open_loop_does_not_wait_for_answers() -> None:
    """Slow answers change neither how many come nor when: the arrivals are a function of rate, time and seed."""
    slow, fast = Fake(seconds=0.3), Fake(seconds=0)
    many, unsent = asyncio.run(open_loop(slow, rate=100, seconds=0.5))
    assert len(many) == len(asyncio.run(open_loop(fast, rate=100, seconds=0.5))[0])
    assert 25 < len(many) < 85
    assert slow.most_open > 10
    assert unsent == 0


def test_an_open_loop_says_what_it_could_not_send() -> None:
    outcomes, unsent = asyncio.run(open_loop(Fake(seconds=0.2), rate=200, seconds=0.2, max_open=5))
    assert len(outcomes) >= 5
    assert unsent > 5


def test_an_open_loop_raises_what_asking_raised() -> None:
    async def ask(number: int) -> Outcome:
        if number == 0:
            raise KeyError("ours")
        return made()

    with pytest.raises(KeyError, match="ours"):
        asyncio.run(open_loop(ask, rate=100, seconds=0.2))


def test_figures_on_known_times() -> None:
    outcomes = [
        made(began=0, ended=2, first_text=0.5, gaps_s=(0.1, 0.3), num_tokens=4, text="yes"),
        made(began=1, ended=4, first_text=1.5, num_tokens=1, text="yes"),
        made(Ending.REFUSED, began=1, ended=1),
        made(Ending.SILENT, began=1, ended=2, num_tokens=3),
        made(Ending.LATE, began=1, ended=3),
    ]
    found = Figures.of(outcomes, {"p": "yes"})
    assert found.seconds == 4
    assert found.tokens_per_s == 5 / 4, "an answer without its end counts for nothing"
    assert found.lost == 2
    assert (found.ttft_ms.p50, found.gap_ms.p95, found.tpot_ms.p50) == (500, 300, 500)
    assert found.endings == {"finished": 2, "refused": 1, "silent": 1, "late": 1}


def test_an_answer_that_follows_anothers_is_mixed() -> None:
    expected = {"a": "Once " * 20, "b": "Twice " * 20}
    texts = {"identical": expected["a"], "mixed": expected["b"], "differing": "Once Once upon", "short": "Twice"}
    found = Answers.of([made(prompt="a", text=text) for text in texts.values()], expected)
    assert (found.identical, found.mixed, found.differing) == (1, 1, 2)
    assert len(texts["short"]) < TELLING_CHARACTERS


def test_what_a_kill_did() -> None:
    outcomes = [
        made(began=0, ended=1, text="x"),
        made(Ending.CUT, began=1, ended=2.1),
        made(Ending.SILENT, began=1, ended=2.2),
        made(Ending.CUT, began=3, ended=3),
        made(began=5, ended=6, text="x"),
    ]
    kill = _told("replica", outcomes, {"p": "x"}, killed=2, recovered=6)
    assert kill.in_flight == {"cut": 1, "silent": 1}
    assert kill.later == {"cut": 1, "finished": 1}
    assert (kill.unclean, kill.recovery_s, kill.last_failure_s) == (1, 4, 1)


def test_memory_growth_leaves_the_warm_up_out() -> None:
    def at(values: list[float]) -> Memory:
        samples = [
            Sample(at_s=i, num_processes=1, rss_mib=v, largest_mib=v / 2, sockets=0) for i, v in enumerate(values)
        ]
        return Memory.of(samples)

    assert at([1, 1, 50, 50, 100, 100, 100, 100]).growth_mib == 50
    assert at([1, 90, 100, 100, 100, 100, 100, 100, 100, 100, 100, 100]).growth_mib == 0
    assert at([10, 20, 30, 40]).growth_mib == 20
    assert at([10, 20, 30, 40]).largest_growth_mib == 10


def test_a_process_is_sampled_with_those_below_it() -> None:
    code = "import socket, sys; s = socket.socket(); print(flush=True); sys.stdin.read()"
    before = sample(pid := os.getpid())
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        now = sample(pid)
        assert child.pid in family(pid)
        child.communicate()
    assert now.num_processes == before.num_processes + 1
    assert now.sockets == before.sockets + 1
    assert now.rss_mib > before.rss_mib >= before.largest_mib > 0


def test_a_server_is_started_killed_restarted_and_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "http.server", "{port}", "--bind", "127.0.0.1"]
    with started(Launch(name="files", command=command, ready_path="/"), folder=tmp_path) as server:
        first = server.pid
        assert server.find(sys.executable) == first
        server.kill()
        server.restart()
        server.wait_ready(20)
        assert server.pid != first
        with pytest.raises(LookupError, match="ray::nobody"):
            server.find("ray::nobody")
    assert family(server.pid) == [server.pid], "it has no process left"


def test_a_server_that_ends_at_once_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no weights')"]
    with pytest.raises(TimeoutError, match="no weights"), started(Launch(name="x", command=command), folder=tmp_path):
        pass


def test_the_page_holds_the_newest_of_each_kind(tmp_path: Path) -> None:
    for name in ("throughput-20260101-0000", "throughput-20260102-0000", "faults-20260101-0000"):
        (tmp_path / f"serving-{name}.md").write_text(f"# Title\n\n- of {name}\n")
    page = collect(tmp_path).read_text()
    assert collect(tmp_path).read_text() == page, "the page is no result of its own"
    assert "of throughput-20260102" in page and "of faults-20260101" in page
    assert "of throughput-20260101" not in page
