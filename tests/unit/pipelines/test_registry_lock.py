"""The registry's lock over a store in memory that is atomic where MLflow's database is, and nowhere else."""

from __future__ import annotations

import random
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines import registry_lock
from pipelines.errors import StageError
from pipelines.registry_lock import RegistryLock

NAME = "heads"


class Store:
    """Registered models by name: creating, tagging and deleting one is atomic, a listing is a snapshot."""

    def __init__(self, *, jitter_s: float = 0.0) -> None:
        self.models: dict[str, dict[str, str]] = {}
        self._atomic = threading.Lock()
        self._jitter_s = jitter_s

    def create_registered_model(self, name: str, tags: dict[str, str], description: str) -> None:
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS

        self._dawdle()
        with self._atomic:
            if name in self.models:
                raise MlflowException("there is one", RESOURCE_ALREADY_EXISTS)
            self.models[name] = dict(tags)
        self._dawdle()

    def set_registered_model_tag(self, name: str, key: str, value: str) -> None:
        from mlflow.exceptions import MlflowException

        self._dawdle()
        with self._atomic:
            if name not in self.models:
                raise MlflowException("there is none")
            self.models[name][key] = value

    def delete_registered_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        self._dawdle()
        with self._atomic:
            if self.models.pop(name, None) is None:
                raise MlflowException("there is none")

    def search_registered_models(self, filter_string: str, max_results: int, page_token: str | None) -> Any:
        self._dawdle()
        with self._atomic:
            found = [SimpleNamespace(name=name, tags=dict(tags)) for name, tags in sorted(self.models.items())]
        self._dawdle()
        page = Page(found)
        page.token = None
        return page

    def _dawdle(self) -> None:
        if self._jitter_s:
            time.sleep(random.uniform(0, self._jitter_s))


class Page(list[Any]):
    token: str | None


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_lock, "POLL_S", 0.002)


def lock(store: Store, lease_s: float = 60.0) -> RegistryLock:
    return RegistryLock(store, NAME, lease_s=lease_s)


def test_one_holder_at_a_time_among_many_contenders() -> None:
    store, inside, worst, count = Store(jitter_s=0.002), 0, 0, 0

    def contend() -> None:
        nonlocal inside, worst, count
        mine = lock(store)
        for _ in range(6):
            with mine.hold(60) as lease:
                inside += 1
                worst = max(worst, inside)
                seen = count
                time.sleep(0.001)
                count = seen + 1  # an update is lost wherever two are inside
                lease.check()
                inside -= 1

    threads = [threading.Thread(target=contend) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (worst, count) == (1, 36)
    assert len(store.models) == 1  # what was left behind is one released name


def test_who_waits_too_long_is_told_who_holds_it() -> None:
    store = Store()
    with lock(store).hold(1) as lease, pytest.raises(StageError, match=lease.owner), lock(store).hold(0.05):
        raise AssertionError("two hold the lock")
    with lock(store).hold(0.05):
        pass


def test_a_dead_holders_lock_lapses_and_the_dead_may_not_write() -> None:
    store = Store()
    dead = lock(store, lease_s=0.1)._acquire("dead", 1)
    dead.check()
    began = time.monotonic()
    with lock(store).hold(5) as lease:
        assert time.monotonic() - began >= 0.1
        lease.check()
        with pytest.raises(StageError, match="lock was lost"):
            dead.check()
        dead.lock._release(dead)  # a name that is gone, or not the highest: it frees nothing
        with pytest.raises(StageError, match=lease.owner), lock(store).hold(0.05):
            raise AssertionError("two hold the lock")


def test_a_lease_ends_on_its_holders_clock_though_nobody_else_came() -> None:
    lease = lock(Store(), lease_s=0.05)._acquire("slow", 1)
    time.sleep(0.06)
    with pytest.raises(StageError, match="lock_lease_s"):
        lease.check()


def test_a_contender_who_read_long_ago_withdraws() -> None:
    store = Store()
    for _ in range(3):
        with lock(store).hold(1):
            pass
    assert set(store.models) == {"heads.lock.3"}
    assert lock(store)._claim(2, "late") is None
    assert lock(store)._claim(3, "late") is None
    assert set(store.models) == {"heads.lock.3"}


def test_a_claim_whose_answer_was_lost_is_recognised_as_ones_own() -> None:
    store = Store()
    create = store.create_registered_model

    def twice(*args: Any, **options: Any) -> None:  # an HTTP client that retries after a lost response
        create(*args, **options)
        create(*args, **options)

    store.create_registered_model = twice  # type: ignore[method-assign]
    with lock(store).hold(1) as lease:
        lease.check()


def test_models_of_like_names_are_no_locks() -> None:
    store = Store()
    store.models |= {"heads.lock.x": {}, "heads.lock.7.bak": {}, "otherheads.lock.9": {}, "heads": {}}
    with lock(store).hold(1) as lease:
        assert lease.generation == 1


def test_a_lock_with_unreadable_tags_counts_as_held() -> None:
    store = Store()
    store.models["heads.lock.4"] = {"medusa.lock.lease_s": "soon"}
    with pytest.raises(StageError, match="somebody"), lock(store).hold(0.05):
        raise AssertionError("two hold the lock")
