"""A conversation on the terminal: read a line, stream the answer, remember both. Knows a model; knows no HTTP."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TextIO

from deploy.terminal import stats_line, write_stream
from medusa.errors import PromptError
from medusa.generate import Model

HELP = "/exit leaves, /reset forgets the conversation; Ctrl-C stops an answer, Ctrl-D leaves"


class Conversation:
    """The turns so far. An interrupted or refused turn is forgotten, so that roles keep alternating."""

    def __init__(self, model: Model, *, system: str | None = None, max_tokens: int = 512, **generation: Any) -> None:
        self._model = model
        self._opening = [{"role": "system", "content": system}] if system else []
        self._max_tokens = max_tokens
        self._generation = generation
        self.turns: list[dict[str, str]] = list(self._opening)

    def reset(self) -> None:
        self.turns = list(self._opening)

    def say(self, text: str, out: TextIO) -> str:
        """Answer one line to `out`; a line of statistics. Raises PromptError when the context is full."""
        asked = [*self.turns, {"role": "user", "content": text}]
        room = self._model.backbone.max_context - len(self._model.encode(asked))
        if room < 1:
            raise PromptError("the conversation fills the context; /reset starts anew")
        chunks = self._model.stream(asked, max_tokens=min(self._max_tokens, room), **self._generation)
        with contextlib.closing(chunks):  # type: ignore[type-var]
            generation = write_stream(chunks, out)
        self.turns = [*asked, {"role": "assistant", "content": generation.text}]
        return stats_line(generation.stats)


def converse(conversation: Conversation, *, ask: Callable[[], str], out: TextIO, note: Callable[[str], None]) -> None:
    """Talk until /exit or the end of input. `ask` returns the next line and raises EOFError; `note` shows an aside."""
    note(HELP)
    while True:
        try:
            line = ask().strip()
        except (EOFError, KeyboardInterrupt):
            note("")
            return
        match line:
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/reset":
                conversation.reset()
                note("forgotten")
            case "/help":
                note(HELP)
            case _ if line.startswith("/"):
                note(f"unknown command {line}; {HELP}")
            case _:
                _answer(conversation, line, out, note)


def _answer(conversation: Conversation, line: str, out: TextIO, note: Callable[[str], None]) -> None:
    try:
        note(conversation.say(line, out))
    except PromptError as error:
        note(str(error))
    except KeyboardInterrupt:
        out.write("\n")
        note("stopped; the turn is forgotten")
