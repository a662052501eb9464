"""One writer at a time in an MLflow registry, whichever machines they are on. Knows names and tags; no aliases, no versions.

MLflow has no compare-and-swap, but the name of a registered model is unique in its database: of all who create the same
name, one succeeds. A lock is therefore a row of such names, `<name>.lock.<generation>`:

- Whoever wants it reads the highest generation. If that one is released, or has stood unreleased for its whole lease,
  he creates the next; the database lets one of all contenders do so.
- The highest generation is never deleted, so a number is never used twice by somebody who believes himself first: a
  contender who read long ago either finds his number taken or, after creating it, sees a higher one and withdraws.
- Clocks are not compared. A contender measures the lease of a silent holder on his own clock, from when he first saw it;
  the holder measures it from before he asked, so the holder's always ends first. `check` asks before every write.

What remains: a holder that stalls for the rest of its lease between `check` and the arrival of its write. Nothing short
of a fence in the server can stop that write; writers re-read what they wrote.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from pipelines.errors import StageError

OWNER, SINCE, EXPIRES, LEASE, RELEASED = (
    f"medusa.lock.{name}" for name in ("owner", "since", "expires", "lease_s", "released")
)
POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One generation of a lock, as the registry shows it. `since` and `expires` are the owner's clock, for people."""

    generation: int
    owner: str
    since: str
    lease_s: float
    released: bool


class RegistryLock:
    """The lock called `name` in the registry behind `client`. Not shared between threads."""

    def __init__(self, client: Any, name: str, *, lease_s: float) -> None:
        self._client = client
        self._name = name
        self._lease_s = lease_s

    @contextlib.contextmanager
    def hold(self, timeout_s: float) -> Iterator[Lease]:
        """Wait for the lock, at most `timeout_s`; StageError names who holds it. Released when the block ends."""
        owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        lease = self._acquire(owner, timeout_s)
        try:
            yield lease
        finally:
            self._release(lease)

    def claims(self) -> list[Claim]:
        """All generations that the registry shows, the highest last."""
        pattern = re.compile(re.escape(self._name) + r"\.lock\.(\d+)")
        found, token = [], None
        while True:
            page = self._client.search_registered_models(
                filter_string=f"name LIKE '{self._name}.lock.%'", max_results=200, page_token=token
            )
            for model in page:
                if match := pattern.fullmatch(model.name):
                    found.append(_claim(int(match[1]), dict(model.tags)))
            token = page.token
            if not token:
                return sorted(found, key=lambda claim: claim.generation)

    def _acquire(self, owner: str, timeout_s: float) -> Lease:
        began = time.monotonic()
        seen: tuple[int, float] = (0, began)  # the generation that stands in the way, and since when we know
        while True:
            asked = time.monotonic()
            top = next(reversed(self.claims()), None)
            if top is not None and top.generation != seen[0]:
                seen = (top.generation, asked)
            if top is None or top.released or asked - seen[1] > top.lease_s:
                lease = self._claim((top.generation if top else 0) + 1, owner)
                if lease is not None:
                    return lease
            elif asked - began > timeout_s:
                raise StageError(
                    f"{top.owner} holds the lock of {self._name} since {top.since}, longer than the {timeout_s:g} s of "
                    f"promote.lock_timeout_s; if it is gone, its lock lapses after {top.lease_s:g} s: raise the timeout"
                )
            if time.monotonic() - began > 10 * timeout_s + 60:
                raise StageError(f"the lock of {self._name} changes hands without end; try again later")
            time.sleep(POLL_S * random.uniform(0.5, 1.5))

    def _claim(self, generation: int, owner: str) -> Lease | None:
        """The lease of a generation, if nobody was faster."""
        from mlflow.exceptions import MlflowException

        asked, now = time.monotonic(), datetime.now(UTC)
        lease = Lease(lock=self, generation=generation, owner=owner, ends=asked + self._lease_s)
        tags = {
            OWNER: owner,
            SINCE: f"{now:%Y-%m-%d %H:%M:%S} UTC",
            EXPIRES: f"{now + timedelta(seconds=self._lease_s):%Y-%m-%d %H:%M:%S} UTC",
            LEASE: f"{self._lease_s:g}",
        }
        with contextlib.suppress(MlflowException):  # the name is taken; by whom, the registry says
            self._client.create_registered_model(
                self._row(generation), tags=tags, description="Lock of promotions, made by medusa. Leave it here."
            )
        claims = self.claims()
        mine = [claim for claim in claims if claim.owner == owner]
        if not mine:
            return None
        if claims[-1].owner != owner:  # we came late to a number that others had left behind
            self._delete(generation)
            return None
        for claim in claims[:-1]:
            self._delete(claim.generation)
        return lease

    def _release(self, lease: Lease) -> None:
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(MlflowException, StageError):  # else it lapses with its lease
            self._client.set_registered_model_tag(self._row(lease.generation), RELEASED, "true")

    def _delete(self, generation: int) -> None:
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(MlflowException):  # another one tidied up first
            self._client.delete_registered_model(self._row(generation))

    def _row(self, generation: int) -> str:
        return f"{self._name}.lock.{generation}"


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right to write until `ends`, on this process's monotonic clock."""

    lock: RegistryLock
    generation: int
    owner: str
    ends: float

    def check(self) -> None:
        """StageError unless the lock is still ours: asked before each write and after the last."""
        top = next(reversed(self.lock.claims()), None)
        if time.monotonic() >= self.ends or top is None or top.owner != self.owner:
            raise StageError(
                "the registry's lock was lost: writing took longer than registry.lock_lease_s; look at "
                "`medusa registry list` and try again"
            )


def _claim(generation: int, tags: dict[str, str]) -> Claim:
    """A lock without readable tags (somebody wrote them by hand) counts as held for a minute."""
    try:
        lease_s = float(tags[LEASE])
    except (KeyError, ValueError):
        lease_s = 60.0
    return Claim(
        generation=generation,
        owner=tags.get(OWNER, "somebody"),
        since=tags.get(SINCE, "an unknown time"),
        lease_s=lease_s,
        released=tags.get(RELEASED) == "true",
    )
