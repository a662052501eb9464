"""Follows an alias of the registry while serving: what bears it now is adopted beside what is served, off its threads.

Knows the registry and when to look; what adopting means is its owner's. A registry out of reach, or a version that does
not load, changes nothing but `problem`.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from typing import Protocol

from medusa.errors import CheckpointError, MedusaError
from pipelines.config import Config
from pipelines.credentials import without_credentials
from pipelines.registry import CHAMPION, Registry, Version, has_registry, open_registry

logger = logging.getLogger(__name__)

MAX_PAUSE_S = 300.0
_LASTING = (CheckpointError, ValueError)  # faults of the version itself; memory, network and the like may do tomorrow


class Source(Protocol):
    """Where versions come from. Where the registry cannot be reached both raise MedusaError or OSError, or whatever a
    client of an object store raises."""

    def bearer(self) -> Version | None: ...

    def fetch(self, version: Version) -> Version: ...


class RegistrySource:
    """The version that bears `alias` in the registry of a configuration. A registry that is not there yet is empty."""

    def __init__(self, config: Config, alias: str) -> None:
        self._config = config
        self._alias = alias
        self._registry: Registry | None = None

    def bearer(self) -> Version | None:
        if not has_registry(self._config):
            return None
        self._registry = self._registry or open_registry(self._config)
        return self._registry.aliased(self._alias)

    def earlier(self) -> list[int]:
        """Numbers of those that bore the alias before its bearer, the latest first. Only champions are remembered."""
        if self._alias != CHAMPION or self._registry is None:
            return []
        *before, present = self._registry.champions() or [0]
        return [number for number in dict.fromkeys(reversed(before)) if number != present]

    def version(self, number: int) -> Version:
        assert self._registry is not None
        return self._registry.version(number)

    def fetch(self, version: Version) -> Version:
        assert self._registry is not None
        return self._registry.fetch(version)


class Follower:
    """Looks every `every_s` seconds, in a thread of its own, whether another version bears the alias; adopts it.

    `adopt` takes a fetched version; whatever it raises is logged with the version. One that is at fault itself is then left
    alone until the alias names another; for any other reason it is tried again after pauses that grow, to five minutes at
    most, while each look still sees whether the alias has moved. `serving` is the version that is served as the alias's; None
    where another's is, or none. While the registry is out of reach the looks' own pauses grow alike; it is told once.
    """

    def __init__(
        self, source: Source, adopt: Callable[[Version], None], *, serving: int | None, every_s: float
    ) -> None:
        self._source = source
        self._adopt = adopt
        self._every_s = every_s
        self._serving = serving
        self._refused: int | None = None
        self._refusal: str | None = None
        self._tries = 0  # of the refused version
        self._rest: float = 0  # looks until it is tried again
        self._unreachable: str | None = None
        self.vacant = False  # no version bore the alias at the last look
        self._failures = 0
        self._looking = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="medusa-champion", daemon=True)

    def start(self) -> Follower:
        """Begin to look; with `every_s` 0, `look` is only ever called by others."""
        if self._every_s > 0:
            self._thread.start()
        return self

    def stop(self) -> None:
        """No look begins after this; one under way is not waited for."""
        self._stopped.set()

    @property
    def problem(self) -> str | None:
        """Why what is served may not be what bears the alias."""
        return self._refusal or self._unreachable

    @property
    def pause_s(self) -> float:
        """Until the next look."""
        return self._grown(self._failures)

    def look(self) -> None:
        """Look once, and adopt what is new. Never raises."""
        with self._looking:
            try:
                version = self._source.bearer()
                fetched = self._source.fetch(version) if version is not None and self._wants(version) else None
            except Exception as error:  # noqa: BLE001 (it is told)
                self._out_of_reach(error)
                return
            self._in_reach(version)
            if fetched is not None and not self._stopped.is_set():
                self._take(fetched)

    def _wants(self, version: Version) -> bool:
        if version.number == self._refused:
            self._rest -= 1
            return self._rest <= 0
        return version.number != self._serving

    def _grown(self, failures: int) -> float:
        """Seconds of pause after so many failures one after the other."""
        return max(self._every_s, min(self._every_s * 2.0 ** min(failures, 32), MAX_PAUSE_S))

    def _take(self, version: Version) -> None:
        try:
            self._adopt(version)
        except Exception as error:
            self._tries = self._tries + 1 if version.number == self._refused else 1
            stays = self._serving or "what is served"
            logger.exception("version %d cannot be served; %s stays", version.number, stays, exc_info=self._tries == 1)
            if isinstance(error, _LASTING):
                self._rest, then = math.inf, ""
            else:
                self._rest = self._grown(self._tries) // self._every_s if self._every_s else 1
                then = "; it is tried again"
            said = without_credentials(str(error) or type(error).__name__)
            self._refused, self._refusal = version.number, f"version {version.number} cannot be served: {said}{then}"
        else:
            self._serving, self._refused, self._refusal = version.number, None, None

    def _out_of_reach(self, error: Exception) -> None:
        told = isinstance(error, (MedusaError, OSError))  # by a message that says what it is
        said = without_credentials(str(error) if told else f"{type(error).__name__}: {error}")
        if not self._failures:
            logger.warning("the registry cannot be followed; what is served stays: %s", said)
        self._failures += 1
        self._unreachable = f"the registry cannot be followed: {said}"

    def _in_reach(self, version: Version | None) -> None:
        if self._failures:
            logger.info("the registry is in reach again")
        self._failures, self._unreachable, self.vacant = 0, None, version is None
        if version is None or version.number != self._refused:
            self._refused = self._refusal = None  # the alias has left the version that could not be served

    def _run(self) -> None:
        while not self._stopped.wait(self.pause_s):
            self.look()
