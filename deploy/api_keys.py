"""API keys: made once, kept as SHA-256 hashes, asked for by an ASGI middleware. Never logged; knows no routes but open ones.

A key has 256 random bits, so a plain hash guards it as well as a slow one would.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from deploy.api import errors
from deploy.refusals import as_response
from medusa.errors import MedusaError
from pipelines.config import ServeSection

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0  # at the file of hashes, while requests come
PREFIX = "sk-medusa-"  # so that secret scanners, and people, know what they have found
OPEN_PATHS = frozenset({"/", "/health", "/metrics"})
OPEN_FOLDERS = ("/playground/",)
_HASH = re.compile(r"[0-9a-f]{64}")


class KeyFileError(MedusaError):
    """The file of key hashes cannot be read, or a line of it is no hash."""


def new_key() -> str:
    """A fresh random key."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """The SHA-256 of `key`, in hex: what a server keeps of it."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def read_hashes(path: Path) -> tuple[str, ...]:
    """One hash a line; empty lines and what follows a # are for people. Raises KeyFileError, never quoting a line.

    A file without a hash is an error too: it would open to everyone what was meant to be closed.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"cannot read the API keys file {path}: {error}") from None
    hashes = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if text and not _HASH.fullmatch(text):
            raise KeyFileError(f"{path}, line {number}: not a SHA-256 hash in lower-case hex; make one: medusa key new")
        hashes += [text] if text else []
    if not hashes:
        raise KeyFileError(f"{path} holds no hash of a key; make one: medusa key new")
    return tuple(hashes)


class KeyRing:
    """The keys that open the server: `hashes`, and those that stand in `file`, which is read again when it has changed.

    Raises KeyFileError for a bad file when it is made; later the keys that were read last go on, and the log says why.
    """

    def __init__(
        self, hashes: Iterable[str], *, file: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._hashes = tuple(hashes)
        self._file = file
        self._clock = clock
        self._looked_at = clock()
        self._seen = _state(file)
        self._from_file = read_hashes(file) if file is not None else ()

    @classmethod
    def of(cls, settings: ServeSection) -> KeyRing:
        """The configured keys and those of the configured file. Raises KeyFileError."""
        return cls(settings.api_keys, file=settings.api_keys_file)

    def __bool__(self) -> bool:
        return bool(self._hashes or self._from_file)

    def opens(self, key: str) -> bool:
        """Whether `key` is one of ours. Every hash is compared in constant time, whichever matches."""
        self._look()
        given = hash_key(key)
        matches = [hmac.compare_digest(given, known) for known in (*self._hashes, *self._from_file)]
        return any(matches)

    def _look(self) -> None:
        now = self._clock()
        if self._file is None or now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        state = _state(self._file)
        if state == self._seen:
            return
        self._seen = state
        try:
            self._from_file = read_hashes(self._file)
        except KeyFileError as error:
            logger.warning("the API keys stay as they were: %s", error)
        else:
            logger.info("API keys read again from %s: %d", self._file, len(self._from_file))


def _state(file: Path | None) -> tuple[int, ...] | None:
    """What changes with a file's content, a mounted secret's too; None where there is no file."""
    try:
        found = file.stat() if file is not None else None
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino) if found is not None else None


class RequireKey:
    """ASGI middleware: 401 unless `Authorization: Bearer <key>` carries a key of the ring. The page, health and metrics
    are open, and so is nothing that is not named here."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope["path"].removeprefix(scope.get("root_path", ""))):
            await self._app(scope, receive, send)
            return
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not key.strip():
            refusal = errors.unauthorized(
                "this server asks for an API key: send the header Authorization: Bearer <key>"
            )
        elif not self._keys.opens(key.strip()):
            refusal = errors.unauthorized("the API key in the header Authorization is not one of this server's")
        else:
            await self._app(scope, receive, send)
            return
        await as_response(refusal)(scope, receive, send)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)
