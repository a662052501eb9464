"""Following an alias: what moves is adopted once, what cannot be served is told and left alone, outages only cost time."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import pytest
import torch

from deploy.champion import MAX_PAUSE_S, Follower, RegistrySource
from medusa.errors import BackboneError, CheckpointError
from pipelines.config import load_config
from pipelines.errors import StageError, TrackingUnreachable
from pipelines.registry import Version
from tests.unit.deploy.conftest import wait_until

OUTAGE = TrackingUnreachable("no MLflow server answers")


class FakeRegistry:
    """A source whose alias, outages and damaged versions a test sets."""

    def __init__(self) -> None:
        self.named: int | None = 1
        self.failure: Exception | None = None
        self.unfetchable: set[int] = set()

    def bearer(self) -> Version | None:
        if self.failure is not None:
            raise self.failure
        return None if self.named is None else Version(number=self.named, source="s", run_id="r")

    def fetch(self, version: Version) -> Version:
        if version.number in self.unfetchable:
            raise StageError(f"version {version.number} cannot be fetched")
        return version


class Adopted(list[int]):
    """What was adopted, in order; versions in `bad` fail, for what is their own fault unless `fault` is another."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: set[int] = set()
        self.fault: Exception = CheckpointError("these heads were trained on another backbone")
        self.tried: list[int] = []

    def __call__(self, version: Version) -> None:
        self.tried.append(version.number)
        if version.number in self.bad:
            raise self.fault
        self.append(version.number)


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry()


@pytest.fixture
def adopted() -> Adopted:
    return Adopted()


@pytest.fixture
def follower(registry: FakeRegistry, adopted: Adopted) -> Follower:
    return Follower(registry, adopted, serving=1, every_s=10.0)


def test_each_move_of_the_alias_is_adopted_once(follower: Follower, registry: FakeRegistry, adopted: Adopted) -> None:
    for named in (1, 1, 2, 2, None, 3, 1):
        registry.named = named
        follower.look()
    assert adopted == [2, 3, 1]
    assert follower.problem is None


def test_a_version_that_cannot_be_served_is_told_and_tried_once(
    follower: Follower, registry: FakeRegistry, adopted: Adopted, caplog: pytest.LogCaptureFixture
) -> None:
    adopted.bad = {2}
    registry.named = 2
    for _ in range(3):
        follower.look()
    assert adopted.tried == [2]
    assert follower.problem == "version 2 cannot be served: these heads were trained on another backbone"
    assert "version 2 cannot be served" in caplog.text
    registry.named = 3
    follower.look()
    assert (adopted, follower.problem) == ([3], None)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
        (MemoryError(), "MemoryError"),
        (BackboneError("the hub is out of reach"), "the hub is out of reach"),
    ],
)
def test_a_version_that_fails_for_what_may_pass_is_tried_again_ever_more_rarely(
    follower: Follower, registry: FakeRegistry, adopted: Adopted, fault: Exception, said: str
) -> None:
    adopted.bad, adopted.fault, registry.named = {2}, fault, 2
    tried_at: list[int] = []
    for look in range(120):
        before = len(adopted.tried)
        follower.look()
        tried_at += [look] * (len(adopted.tried) - before)
    assert [b - a for a, b in itertools.pairwise(tried_at)] == [2, 4, 8, 16, 30, 30]  # looks of 10 s: 300 s at most
    assert follower.pause_s == 10  # looks go on, so that a rollback is seen at once
    assert follower.problem == f"version 2 cannot be served: {said}; it is tried again"
    adopted.bad = set()
    for _ in range(30):
        follower.look()
    assert (adopted, follower.problem) == ([2], None)


def test_a_version_that_failed_starts_over_when_the_alias_comes_back_to_it(
    follower: Follower, registry: FakeRegistry, adopted: Adopted
) -> None:
    adopted.bad, adopted.fault = {2}, MemoryError()
    for named in (2, 2, 2, 1, 2, 2, 2):
        registry.named = named
        follower.look()
    assert adopted.tried == [2, 2] * 2


def test_a_long_outage_does_not_end_the_looks(follower: Follower) -> None:
    follower._failures = 5000
    assert follower.pause_s == MAX_PAUSE_S


def test_a_rollback_from_a_version_that_cannot_be_served_clears_the_problem(
    follower: Follower, registry: FakeRegistry, adopted: Adopted
) -> None:
    adopted.bad = {2}
    for named in (2, 1):
        registry.named = named
        follower.look()
    assert follower.problem is None
    assert adopted == []


def test_an_outage_is_told_once_and_the_pauses_grow(
    follower: Follower, registry: FakeRegistry, adopted: Adopted, caplog: pytest.LogCaptureFixture
) -> None:
    registry.failure, registry.named = OUTAGE, 2
    pauses = []
    with caplog.at_level(logging.INFO, logger="deploy.champion"):
        for _ in range(8):
            follower.look()
            pauses.append(follower.pause_s)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert pauses == sorted(pauses)
        assert (pauses[0], pauses[-1]) == (20, MAX_PAUSE_S)
        assert follower.problem is not None
        registry.failure = None
        follower.look()
    assert adopted == [2]
    assert (follower.problem, follower.pause_s) == (None, 10)


def test_a_refused_version_is_still_told_of_after_an_outage(
    follower: Follower, registry: FakeRegistry, adopted: Adopted
) -> None:
    adopted.bad, registry.named = {2}, 2
    follower.look()
    registry.failure = OUTAGE
    follower.look()
    registry.failure = None
    follower.look()
    assert adopted.tried == [2]
    assert follower.problem is not None
    assert "version 2" in follower.problem


def test_artifacts_out_of_reach_are_tried_again(follower: Follower, registry: FakeRegistry, adopted: Adopted) -> None:
    registry.named, registry.unfetchable = 2, {2}
    follower.look()
    assert adopted.tried == []
    registry.unfetchable = set()
    follower.look()
    assert adopted == [2]


def test_no_error_of_a_source_ends_the_thread(registry: FakeRegistry, adopted: Adopted) -> None:
    """A client of an object store raises errors of its own, and ImportError where it is not installed."""
    registry.named, registry.failure = 2, ModuleNotFoundError("No module named 'boto3'")
    follower = Follower(registry, adopted, serving=1, every_s=0.02).start()
    wait_until(lambda: follower.problem is not None)
    assert follower.problem == "the registry cannot be followed: ModuleNotFoundError: No module named 'boto3'"
    registry.failure = None
    wait_until(lambda: adopted == [2])
    follower.stop()


def test_no_password_is_told(follower: Follower, registry: FakeRegistry, caplog: pytest.LogCaptureFixture) -> None:
    registry.failure = OSError("no answer from http://me:secret@mlflow:5000/x")
    follower.look()
    assert follower.problem == "the registry cannot be followed: no answer from http://***@mlflow:5000/x"
    assert "secret" not in caplog.text


def test_the_thread_looks_by_itself_until_it_is_stopped(registry: FakeRegistry, adopted: Adopted) -> None:
    follower = Follower(registry, adopted, serving=1, every_s=0.02).start()
    registry.named = 2
    wait_until(lambda: adopted == [2])
    follower.stop()
    follower._thread.join(5)
    assert not follower._thread.is_alive()


def test_following_can_be_switched_off(registry: FakeRegistry, adopted: Adopted) -> None:
    follower = Follower(registry, adopted, serving=1, every_s=0).start()
    assert not follower._thread.is_alive()


def test_looking_makes_no_registry(tmp_path: Path) -> None:
    config = load_config(None, [f"workdir={tmp_path / 'nothing'}"])
    assert RegistrySource(config, "champion").bearer() is None
    assert not (tmp_path / "nothing").exists()


def test_a_registrys_failure_quotes_no_password(tmp_path: Path) -> None:
    config = load_config(None, [f"workdir={tmp_path}", "registry.tracking_uri=nonsense://me:secret@database/x"])
    with pytest.raises(StageError, match=r"nonsense://\*\*\*@database/x") as caught:
        RegistrySource(config, "champion").bearer()
    assert "secret" not in str(caught.value)
