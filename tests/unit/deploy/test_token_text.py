"""The bytes of single tokens, joined, are the text; so are the offsets where tokens begin."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from deploy.api.token_text import TextOffsets, TokenTexts
from tests.tiny_models import EOS_ID, VOCAB_SIZE, make_tiny_tokenizer

TOKENIZER: Any = make_tiny_tokenizer()
TOKENS = TokenTexts(TOKENIZER)


@settings(deadline=None)
@given(st.text())
def test_bytes_of_tokens_are_the_texts(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert b"".join(map(TOKENS.bytes_of, ids)) == text.encode()


@settings(deadline=None)
@given(st.text())
def test_offsets_lie_where_characters_begin(text: str) -> None:
    """Against the oracle: how much whole text the tokens before give."""
    ids, offsets = TOKENIZER(text, add_special_tokens=False)["input_ids"], TextOffsets(TOKENS)
    for count, token in enumerate(ids):
        before = b"".join(map(TOKENS.bytes_of, ids[:count])).decode(errors="ignore")
        assert offsets.push(token) == len(before)


def test_half_a_character_is_shown_as_its_bytes() -> None:
    pieces = [TOKENS.text_of(token) for token in TOKENIZER("😀", add_special_tokens=False)["input_ids"]]
    assert pieces == ["\\xf0", "\\x9f", "\\x98", "\\x80"]


def test_special_tokens_have_bytes_and_take_no_room() -> None:
    offsets = TextOffsets(TOKENS)
    assert TOKENS.bytes_of(EOS_ID) == b"<|im_end|>"
    assert [offsets.push(token) for token in (EOS_ID, *TOKENIZER("ab", add_special_tokens=False)["input_ids"])] == [
        0,
        0,
        1,
    ]


def test_an_id_without_a_token_is_empty() -> None:
    assert TOKENS.bytes_of(VOCAB_SIZE) == b""


@pytest.fixture(scope="module")
def sentencepiece() -> TokenTexts:
    """The other kind of vocabulary: words after ▁, bytes as <0xNN>."""
    backend = Tokenizer(models.WordLevel({"▁sky": 0, "<0xE2>": 1, "é": 2}, unk_token="é"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return TokenTexts(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_sentencepieces_tokens(sentencepiece: TokenTexts) -> None:
    assert [sentencepiece.bytes_of(token) for token in range(3)] == [b" sky", b"\xe2", "é".encode()]


SPACED = ["▁", "▁▁", "▁sky", "▁▁▁x", "ger", "é", "<0xC3>", "<0xA9>", "<s>"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(SPACED[:6] + SPACED[8:]), max_size=8) | st.just(["<0xC3>", "<0xA9>", "▁sky", "ger"]))
def test_offsets_count_no_space_that_the_tokenizer_leaves_out(words: list[str]) -> None:
    """Llama 2's decoder: against the oracle, how much text the tokens before give."""
    backend = Tokenizer(models.WordLevel({word: token for token, word in enumerate(SPACED)}, unk_token="é"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    offsets, ids = TextOffsets(TokenTexts(tokenizer)), [SPACED.index(word) for word in words]
    for count, token in enumerate(ids):
        before = tokenizer.decode(ids[:count], skip_special_tokens=True)
        assert offsets.push(token) == len(before.rstrip("\ufffd"))
