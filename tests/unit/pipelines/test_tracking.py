from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from pipelines import tracking
from pipelines.errors import TrackingUnreachable
from pipelines.tracking import Entry, Journal, Sender, git_revision, within_reach


class Server:
    """What stands at the other end: away at first or for good, then it takes what it is sent."""

    def __init__(self, away_for: int) -> None:
        self.away_for = away_for
        self.got: list[Entry] = []

    def __call__(self, entries: list[Entry]) -> None:
        if self.away_for > 0:
            self.away_for -= 1
            raise ConnectionError("nobody\nthere")
        self.got += entries


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "SEND_EVERY_S", 0.01)
    monkeypatch.setattr(tracking, "_WAIT_S", 0.001)


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_entries_arrive_in_order_and_once_while_training_goes_on() -> None:
    server, journal = Server(0), Journal()
    sender = Sender(journal, server, where="here")
    for step in range(5):
        journal.add(step, {"loss": step / 2})
    wait_for(lambda: len(server.got) == 5)
    journal.add(5, {"loss": 2.5})
    assert sender.close() == 0
    assert [entry.step for entry in server.got] == list(range(6))
    assert server.got[5].values == {"loss": 2.5}


def test_a_server_that_comes_back_gets_what_waited_and_the_log_two_lines(caplog: pytest.LogCaptureFixture) -> None:
    server, journal = Server(4), Journal()
    journal.add(1, {"loss": 1.0})
    sender = Sender(journal, server, where="http://there")
    journal.add(2, {"loss": 0.5})
    wait_for(lambda: len(server.got) == 2)
    assert sender.close() == 0
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 2
    assert "http://there is out of reach (nobody there)" in lines[0] and "is back" in lines[1]


def test_what_could_not_be_sent_is_counted_and_goes_into_the_checkpoint(tmp_path: Path) -> None:
    server, journal = Server(10**9), Journal()
    journal.add(3, {"loss": 1.0, "grad_norm": 2.0})
    assert Sender(journal, server, where="x").close() == 1
    journal.save(tmp_path / "metrics.jsonl")
    back = Journal.load(tmp_path / "metrics.jsonl")
    assert back.waiting == journal.entries
    assert Journal.load(tmp_path / "nowhere").waiting == []


def test_what_was_sent_is_not_kept_for_later(tmp_path: Path) -> None:
    journal = Journal()
    journal.add(1, {"loss": 1.0})
    assert Sender(journal, Server(0), where="x").close() == 0
    journal.save(tmp_path / "metrics.jsonl")
    assert Journal.load(tmp_path / "metrics.jsonl").entries == []


def test_a_call_is_tried_again_before_the_server_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    tries = []

    def call() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError("not yet")
        return "here"

    assert within_reach(call, "http://there") == "here" and len(tries) == 3

    def never() -> str:
        raise ConnectionError("gone")

    assert within_reach(never, "http://there") is None
    assert "http://there is out of reach (gone)" in caplog.text


def test_a_server_that_was_waited_for_is_not_waited_for_again(caplog: pytest.LogCaptureFixture) -> None:
    tries = []

    def away() -> str:
        tries.append(1)
        raise TrackingUnreachable("no MLflow server answers")

    assert within_reach(away, "http://there") is None and len(tries) == 1
    assert "http://there is out of reach (no MLflow server answers)" in caplog.text


def test_passwords_of_a_server_out_of_reach_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    uri = "http://me:SECRET@there:5000"

    def away(*_: object) -> None:
        raise ConnectionError("x" * 180 + f" {uri}/api")  # a cut in its middle would leave it unlike a URI

    journal = Journal()
    journal.add(1, {"loss": 1.0})
    assert Sender(journal, away, where=uri).close() == 1
    assert within_reach(away, uri) is None
    assert caplog.text.count("http://***@there:5000 is out of reach") == 2
    assert "SECRET" not in caplog.text


def test_a_database_that_fails_is_no_server_out_of_reach() -> None:
    def broken() -> str:
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="on fire"):
        within_reach(broken, "sqlite:////x")


def test_a_server_that_says_no_is_not_away() -> None:
    from mlflow.exceptions import MlflowException

    def refused() -> str:
        raise MlflowException.invalid_parameter_value("a key twice")

    with pytest.raises(MlflowException, match="a key twice"):
        within_reach(refused, "http://there")


def test_the_revision_is_the_environments_where_there_is_no_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("MEDUSA_GIT_REVISION", "abc")
    assert git_revision() == "abc"
