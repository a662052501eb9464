"""The bytes that single tokens stand for. Knows tokenizers of transformers; knows no answers."""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # sentencepiece's fallback for what has no token
_WORD_START = "\u2581"  # sentencepiece's space


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: printable Latin-1 stands for itself, and what is not
    printable is numbered from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


class TokenBytes:
    """Bytes of single tokens. Those of an answer's tokens, joined, are its UTF-8 text and special tokens; but a space may come
    first that sentencepiece leaves out of a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.all_special_ids)

    def bytes_of(self, token_id: int) -> bytes:
        """Empty for an id without a token: vocabularies are padded."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        if token_id in self._added_ids:
            return str(token).encode()
        if self._is_byte_level and all(char in self._alphabet for char in token):
            return bytes(self._alphabet[char] for char in token)
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else str(token).replace(_WORD_START, " ").encode()

    def left_out(self, token_id: int) -> int:
        """How many of the token's characters are missing where a text begins with it."""
        own = self.bytes_of(token_id).decode(errors="ignore")
        text = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        return max(0, _spaces(own) - _spaces(text))

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.added_tokens_decoder)

    @cached_property
    def _is_byte_level(self) -> bool:
        """Told by the decoder of the tokenizer, alone or one of a sequence."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None or backend.decoder is None:
            return False
        decoder = json.loads(backend.decoder.__getstate__())
        return "ByteLevel" in {step["type"] for step in decoder.get("decoders", [decoder])}

    @cached_property
    def _alphabet(self) -> dict[str, int]:
        return _byte_alphabet()


def _spaces(text: str) -> int:
    """How many it begins with."""
    return len(text) - len(text.lstrip(" "))
