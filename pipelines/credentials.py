"""What messages, logs and artifacts leave out: passwords in URIs. Knows text alone."""

from __future__ import annotations

import re
from typing import Any

_NEXT_URI = r"[\s,;|=<>()\[\]{}'\"][A-Za-z][A-Za-z0-9+.-]*://"  # a password may hold :// itself


def without_credentials(text: str) -> str:
    """`text` with the user and password of each URI in it as ***: what may stand in a message, a log or `/health`.

    A password goes as far as it can, up to the last @ before a space or the next URI, since one may hold / and @ itself; so
    a path behind a port that holds an @ goes with it. A user without a password ends at the first /: s3://bucket/a@b has none.
    """
    text = re.sub(rf"://[^/\s:]*(:(?!//)((?!{_NEXT_URI})\S)*)?@", "://***@", text)
    return re.sub(r"([?&]\w*(?:password|secret|token)=)[^&\s'\"]+", r"\1***", text, flags=re.IGNORECASE)


def one_line(error: BaseException, *, limit: int = 200) -> str:
    """What an error says as one line of at most `limit` characters, without credentials."""
    return without_credentials(" ".join(str(error).split()))[:limit]


def without_credentials_in(tree: Any) -> Any:
    """Lists and dictionaries as they are, each text in them `without_credentials`."""
    if isinstance(tree, dict):
        return {key: without_credentials_in(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_credentials_in(value) for value in tree]
    return without_credentials(tree) if isinstance(tree, str) else tree
