"""What one token says by itself: a string for its bytes, and where in a text it begins. Knows no protocol object."""

from __future__ import annotations

import codecs

from medusa.token_bytes import TokenBytes


def shown(token: bytes) -> str:
    r"""As OpenAI shows a token: its text, with bytes that are no whole character as `\xf0\x9f`."""
    return token.decode(errors="backslashreplace")


class TokenTexts(TokenBytes):
    """Bytes and strings of single tokens."""

    def text_of(self, token_id: int) -> str:
        return shown(self.bytes_of(token_id))


class TextOffsets:
    """Where each token of one answer begins in its text, in characters. Special tokens are not text."""

    def __init__(self, tokens: TokenTexts) -> None:
        self._tokens = tokens
        self._special_ids = tokens.special_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0
        self._begins = True

    def push(self, token_id: int) -> int:
        """The offset of the next token. One that goes on with a character begins where that character does."""
        offset = self._offset
        if token_id not in self._special_ids:
            self._offset += len(self._decoder.decode(self._tokens.bytes_of(token_id)))
            if self._begins:
                self._offset -= self._tokens.left_out(token_id)
                self._begins = False
        return offset
