"""Streamed text equals text decoded at once, and stops where it should."""

from __future__ import annotations

import time
from codecs import getincrementaldecoder
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from medusa.detokenize import TextStream
from medusa.token_bytes import TokenBytes
from tests.tiny_models import EOS, EOS_ID, make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


BYTE_IDS = {TokenBytes(TOKENIZER).bytes_of(token): token for token in range(len(TOKENIZER))}


def id_of_byte(byte: int) -> int:
    return BYTE_IDS[bytes([byte])]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30))
def test_pieces_add_up_to_the_text_and_never_break_a_character(text: str) -> None:
    stream, pieces = TextStream(TOKENIZER), []
    for token in ids_of(text):
        assert not stream.push(token)
        pieces.append(stream.take())
    pieces.append(stream.finish())
    assert "".join(pieces) == TOKENIZER.decode(ids_of(text)) == stream.text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(
    st.text(alphabet="abc ", max_size=25),
    st.lists(st.text(alphabet="abc ", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_the_first_stop_string_cuts_and_no_part_of_it_is_ever_shown(text: str, stops: list[str]) -> None:
    stream, shown = TextStream(TOKENIZER, stops), ""
    ids = ids_of(text)
    for token in ids:
        done = stream.push(token)
        shown += stream.take()
        if done:
            break
    shown += stream.finish()
    found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    assert shown == (text[: min(found)[1]] if found else text)
    assert stream.stopped == bool(found)


@settings(max_examples=150, deadline=None)
@given(
    st.text(alphabet="ab", max_size=25),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=8), min_size=1, max_size=3),
)
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    stream, shown = TextStream(TOKENIZER, stops), ""
    for token in ids_of(text):
        if stream.push(token):
            break
        shown += stream.take()
        held = [size for stop in stops for size in range(len(stop)) if stream.text.endswith(stop[:size])]
        assert shown == stream.text[: len(stream.text) - max(held)]


def test_long_stop_strings_cost_little() -> None:
    """Sixteen at once, behind a text as long as they are: a piece takes far less than a step."""
    stream = TextStream(TOKENIZER, ["a" * 8000 + letter for letter in "bcdefghijklmnopq"])
    for token in ids_of("z" * 8000):
        stream.push(token)
    ids = ids_of("az" * 25)
    began = time.thread_time()
    for token in ids:
        stream.push(token)
        stream.take()
    assert (time.thread_time() - began) / len(ids) < 0.003


def test_a_character_split_across_tokens_waits_until_it_is_whole() -> None:
    stream = TextStream(TOKENIZER)
    ids = ids_of("🙂")
    assert len(ids) > 1
    for token in ids[:-1]:
        stream.push(token)
        assert stream.take() == ""
    stream.push(ids[-1])
    assert stream.take() == "🙂"


def pieces_of(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token showed, and the end; their sum is the whole text."""
    stream, pieces = TextStream(tokenizer), []
    for token in ids:
        stream.push(token)
        pieces.append(stream.take())
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    assert stream.finish() == "" and stream.text == "".join(pieces)  # the end may be told twice
    return pieces


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([0xF0, 0x9F, 0x98, 0x80, 0xEF, 0xBF, 0xBD, 0xC3, 0x61]) | st.just(EOS), max_size=20))
def test_any_bytes_give_what_a_decoder_of_utf8_gives_that_waits_for_more(answer: list[int | str]) -> None:
    """Bytes that are no UTF-8 are U+FFFD wherever they stand; those of a character that is not complete are nothing."""
    written = bytes(byte for byte in answer if isinstance(byte, int))
    ids = [EOS_ID if byte == EOS else id_of_byte(byte) for byte in answer]
    assert "".join(pieces_of(TOKENIZER, ids)) == getincrementaldecoder("utf-8")("replace").decode(written)


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    """Bytes as tokens <0xNN>: of a run that is no UTF-8 this tokenizer shows every byte as U+FFFD, whole characters too."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.WordLevel({name: byte for byte, name in enumerate([*names, "▁sky", "\ufffd"])}))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="aé你🙂\ufffd", max_size=8), cut=st.integers(0, 3))
def test_a_cut_inside_a_character_leaves_the_characters_before_it(sentencepiece: Any, text: str, cut: int) -> None:
    written = text.encode()[: -cut or None]
    for tokenizer, ids in ((sentencepiece, list(written)), (TOKENIZER, [id_of_byte(byte) for byte in written])):
        assert "".join(pieces_of(tokenizer, ids)) == written.decode(errors="ignore")


def test_a_replacement_that_was_written_is_shown_at_once(sentencepiece: Any) -> None:
    sky, replacement, half = 256, 257, 0xE5
    assert pieces_of(sentencepiece, [sky, replacement, replacement, half]) == [" sky", "\ufffd", "\ufffd", "", ""]
    assert pieces_of(sentencepiece, [*"\ufffd".encode(), half]) == ["", "", "\ufffd", "", ""]


WORDS = ["<s>", "</s>", "<unk>", "▁Hello", "▁big", "ger", "▁", "▁▁", "▁▁▁x", "<0xC3>", "<0xA9>", "é"]


@pytest.fixture(scope="module", params=["Llama 2", "Metaspace"])
def space_first(request: pytest.FixtureRequest) -> Any:
    """Words that bring the space before them, which is left out where a text begins."""
    backend = Tokenizer(models.WordLevel({word: token for token, word in enumerate(WORDS)}, unk_token="<unk>"))
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps) if request.param == "Llama 2" else decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([word for word in WORDS if not word.startswith("<0x")]), max_size=12))
def test_a_space_is_left_out_at_the_beginning_alone(space_first: Any, words: list[str]) -> None:
    ids = [WORDS.index(word) for word in words]
    assert "".join(pieces_of(space_first, ids)) == space_first.decode(ids, skip_special_tokens=True)


def test_a_stop_string_with_the_space_after_a_special_token_is_found(space_first: Any) -> None:
    stream = TextStream(space_first, [" big"])
    assert [stream.push(WORDS.index(word)) for word in ("▁Hello", "</s>", "▁big")] == [False, False, True]
    assert stream.text == "Hello"


def test_a_long_run_of_special_tokens_costs_little() -> None:
    stream, ids = TextStream(TOKENIZER), [*ids_of("hi"), *[EOS_ID] * 4000]
    began = time.thread_time()
    for token in ids:
        stream.push(token)
    assert (time.thread_time() - began) / len(ids) < 0.001 and stream.text == "hi"


def test_special_tokens_are_no_text() -> None:
    stream = TextStream(TOKENIZER)
    for token in [*ids_of("hi"), EOS_ID]:
        stream.push(token)
    assert stream.take() + stream.finish() == "hi"


def test_nothing_comes_after_a_stop() -> None:
    stream = TextStream(TOKENIZER, ["b"])
    assert [stream.push(token) for token in ids_of("abc")][-1]
    assert stream.push(ids_of("z")[0]) and stream.take() + stream.finish() == "a"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        TextStream(TOKENIZER, ["x", ""])
