"""Token ids to text, piece by piece as they arrive. Knows a tokenizer and stop strings; knows nothing of decoding."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from medusa.token_bytes import TokenBytes

REPLACEMENT = "\ufffd"


class TextStream:
    """Text of a growing answer. A piece comes out only when later tokens cannot change it: characters split across
    tokens are held until whole, and text that may become a stop string until it has or cannot. The stop string that is
    complete first wins, whatever the tokens it came in. Special tokens are not text, nor are the bytes of a character
    that the end of the answer cuts. U+FFFD is text where the answer says so: as that character, or by bytes that are none.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        if any(not text for text in stop):
            raise ValueError("a stop string is empty; give text or leave it out")
        self._tokenizer = tokenizer
        self._bytes = TokenBytes(tokenizer)
        self._stops = [_Stop(text) for text in stop]
        self._ids: list[int] = []
        self._anchor = 0
        self._read = 0
        self._text = ""
        self._taken = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All text so far, cut before the stop string."""
        return self._text

    def push(self, token_id: int) -> bool:
        """Add a token; True when a stop string is complete. Nothing after it is kept."""
        if self.stopped:
            return True
        self._ids.append(token_id)
        self._grow(final=False)
        return self.stopped

    def take(self) -> str:
        """The text that has become certain since the last call."""
        end = len(self._text) if self.stopped else len(self._text) - self._held()
        piece = self._text[self._taken : end]
        self._taken = max(self._taken, end)
        return piece

    def finish(self) -> str:
        """No more tokens come: the rest of the text, without a character that is not complete."""
        if not self.stopped:
            self._grow(final=True)
        piece = self._text[self._taken :]
        self._taken = len(self._text)
        return piece

    def _grow(self, *, final: bool) -> None:
        """Decode from a token boundary where text was whole, so that cost does not grow with the answer, and with some text
        before it: a tokenizer may leave out the space with which a text begins."""
        before = self._decode(self._anchor, self._read)
        new = self._decode(self._anchor, len(self._ids))[len(before) :]
        whole = self._whole(new)
        if whole != new and not final:
            return
        if whole:
            self._anchor = self._read
        elif self._ids and self._ids[-1] in self._special_ids:
            self._ids.pop()  # or a long run of them would be decoded again with each
        self._read = len(self._ids)
        self._append(whole)

    def _whole(self, text: str) -> str:
        """The unread tokens' `text` without what stands at its end for bytes that later tokens may complete.

        A tokenizer shows those as one U+FFFD or as several, and may take whole characters before them along. So as many
        U+FFFD stay there as the bytes end in as characters.
        """
        if not text.endswith(REPLACEMENT):
            return text
        unread = (self._bytes.bytes_of(token) for token in self._ids[self._read :] if token not in self._special_ids)
        written = codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(unread))
        return text.rstrip(REPLACEMENT) + REPLACEMENT * min(_replacements(written), _replacements(text))

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return self._bytes.special_ids

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(
            self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _append(self, text: str) -> None:
        """Add `text`, cut before the stop string that is complete first; of several, before the longest."""
        for count, character in enumerate(text if self._stops else "", start=1):
            complete = [len(stop.text) for stop in self._stops if stop.push(character)]
            if complete:
                whole = self._text + text[:count]
                self._text = whole[: len(whole) - max(complete)]
                self.stopped = True
                return
        self._text += text

    def _held(self) -> int:
        """How many characters at the end may still become a stop string."""
        return max((stop.matched for stop in self._stops), default=0)


class _Stop:
    """One stop string, sought character by character at a cost that its length does not change (Knuth, Morris, Pratt).

    The text so far ends in the first `matched` characters of it, and in no more of them.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._shorter = [0]  # the next shorter match, of each that there was

    def push(self, character: str) -> bool:
        """Read a character; True when the string is complete, after which none may come."""
        self.matched = self._extended(self.matched, character)
        if self.matched > len(self._shorter):
            self._shorter.append(self._extended(self._shorter[-1], character))
        return self.matched == len(self.text)

    def _extended(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._shorter[matched - 1]
        return matched + (self.text[matched] == character)


def _replacements(text: str) -> int:
    """How many U+FFFD stand at the end."""
    return len(text) - len(text.rstrip(REPLACEMENT))
