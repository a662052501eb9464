"""Who is let in, and how busy a loop is. Counts requests and seconds; knows no engine and no clients."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deploy.errors import EngineOverloaded

MEAN_WEIGHT = 1 / 8


@dataclass(frozen=True, kw_only=True)
class Load:
    """How busy the loop is: requests with a slot and without, and the slots for new requests. While an old engine drains
    more than `slots` may run."""

    running: int
    waiting: int
    slots: int


class Admission:
    """Refuses early what would wait too long: more than `max_waiting` at once, or longer than about `max_wait_s`."""

    def __init__(self, *, max_waiting: int, max_wait_s: float = math.inf) -> None:
        self.max_waiting = max_waiting
        self.max_wait_s = max_wait_s
        self._answer_s = 0.0  # what an answer lately took in its slot; 0 before the first

    def check(self, *, ahead: int, count: int, slots: int) -> None:
        """EngineOverloaded for a request of `count` answers behind `ahead` that run, `slots` at once, or wait. Its own wait for
        each other however long: that is no reason to come back later."""
        wait_s = max(ahead - slots + 1, 0) * self._answer_s / slots  # until the first of its answers begins
        most = slots + self.max_waiting
        if ahead + count > most:
            said = (
                f"{ahead} requests are in flight and this one asks for {count} more, {most} are the most that are taken"
            )
        elif wait_s > self.max_wait_s:
            said = f"{ahead} requests are in flight: this one would wait about {wait_s:.0f} s to begin"
        else:
            return
        raise EngineOverloaded(f"{said}; try again later", retry_after_s=max(wait_s, 1.0))

    def learn(self, took_s: float) -> None:
        """An answer held its slot this long: a running mean of the last dozen or so is kept."""
        self._answer_s += (took_s - self._answer_s) * (MEAN_WEIGHT if self._answer_s else 1.0)
