"""The load and fault harness against the real routes over a tiny model."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import serving, serving_faults
from benchmarks.serving_client import Ending, Endpoint, session
from benchmarks.serving_load import closed_loop
from benchmarks.serving_malformed import KINDS, Reply, Tally, answers_well, attacks, parse, send_all
from tests.unit.deploy.conftest import BATCH, PacedEngine, make_loop, model, serve_app, url  # noqa: F401

PROMPTS = serving.built_in(4)


def test_load_on_an_endpoint_is_measured_and_written(url: str, tmp_path: Path) -> None:  # noqa: F811
    serving.main(
        server=[f"{url}/v1"], clients=[1, 6], decoding=["tree"], seconds=0.5, repeats=2, open_multiple=1.5, open_seconds=0.5,
        max_tokens=8, limit=4, output=tmp_path, pid=None,
    )  # fmt: skip
    (record,) = tmp_path.glob("serving-throughput-*.json")
    levels = json.loads(record.read_text())["figures"]["levels"]
    assert len(levels) == 2 * 2 + 1
    for level in levels:
        figures = level["figures"]
        assert figures["endings"].keys() <= {"finished", "refused"}
        assert figures["lost"] == figures["answers"]["mixed"] == figures["answers"]["differing"] == 0
        assert figures["answers"]["identical"] == figures["endings"]["finished"] > 0
    assert "python -m benchmarks.serving" in (tmp_path / "serving.md").read_text()


def test_an_overloaded_server_refuses_properly_and_loses_nothing(make_loop: Callable, serve_app: Callable) -> None:  # noqa: F811
    async def load(base: str) -> list:
        async with session() as http:
            endpoint = Endpoint(url=base, model="tiny", max_tokens=8)
            one = serving.asking(http, endpoint, PROMPTS)
            return await closed_loop(one, clients=3 * BATCH, seconds=30, requests=6 * BATCH)

    with make_loop(PacedEngine, max_waiting=2) as loop, serve_app(loop) as base:
        outcomes = asyncio.run(load(base))
    endings = {one.ending for one in outcomes}
    assert endings == {Ending.FINISHED, Ending.REFUSED}, [one.detail for one in outcomes]


def test_a_prompt_that_is_not_answered_ends_the_measurement(url: str) -> None:  # noqa: F811
    async def go() -> None:
        async with session() as http:
            await serving.reference(http, Endpoint(url=url, model="tiny", max_tokens=10_000), PROMPTS)

    with pytest.raises(ValueError, match="does not answer prompt writing-0"):
        asyncio.run(go())


def test_malformed_requests_leave_nothing_behind(url: str) -> None:  # noqa: F811
    siege = asyncio.run(serving_faults.besiege(url, None, 250, PROMPTS, 8, seed=0, batch=BATCH))
    assert siege.tally.sent == 250
    assert siege.tally.bad == 0, siege.tally.first_bad
    assert siege.tally.timed_out == 0
    assert (siege.answers.identical, siege.refused_after) == (BATCH, 0)
    assert {kind.partition(":")[0] for kind in siege.tally.statuses} == {
        one.kind for one in attacks(13, model="m", seed=0)
    }


def test_attacks_are_a_function_of_the_seed() -> None:
    assert attacks(40, model="m", seed=3) == attacks(40, model="m", seed=3) != attacks(40, model="m", seed=4)
    assert len({kind(random.Random(0), "m").kind for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize(
    ("answer", "well"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\ndata: {}", True),
        (b"", True),
        (b"HTTP/1.1 400 Bad Request\r\n\r\nInvalid HTTP request received.", True),
        (
            b'HTTP/1.1 400 Bad Request\r\n\r\n{"error": {"message": "m", "type": "t", "param": null, "code": null}}',
            True,
        ),
        (b'HTTP/1.1 422 Unprocessable\r\n\r\n{"detail": []}', False),
        (b"HTTP/1.1 404 Not Found\r\n\r\nNot Found", False),
        (b"HTTP/1.1 500 Internal Server Error\r\n\r\nInternal Server Error", False),
        (b'HTTP/1.1 500 Oops\r\n\r\n{"error": {"message": "m", "type": "t", "param": null, "code": null}}', False),
    ],
)
def test_what_is_a_good_answer_to_a_bad_request(answer: bytes, well: bool) -> None:
    reply = parse("any", answer)
    assert answers_well(reply) is well
    assert Tally.of([reply]).bad == (not well)


def test_a_server_that_is_not_there_answers_nothing() -> None:
    replies = asyncio.run(send_all("http://127.0.0.1:9", attacks(3, model="m", seed=0)))
    assert replies == [Reply(kind=one.kind, status=None) for one in attacks(3, model="m", seed=0)]


@pytest.mark.parametrize("given", [{}, {"victim": ["everybody"]}])
def test_faults_must_be_named(given: dict) -> None:
    with pytest.raises(ValueError, match=r"give --victim|no victim 'everybody'"):
        serving_faults.main(**given, malformed=0)


def test_another_host_is_not_loaded() -> None:
    with pytest.raises(ValueError, match="--i-own-this-host"):
        serving.main(server=["http://192.0.2.1:8000"], limit=1)
