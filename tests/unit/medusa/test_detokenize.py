"""Streamed text equals text decoded at once, and stops where it should."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa.detokenize import TextStream
from tests.tiny_models import EOS_ID, make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


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


def test_a_character_split_across_tokens_waits_until_it_is_whole() -> None:
    stream = TextStream(TOKENIZER)
    ids = ids_of("🙂")
    assert len(ids) > 1
    for token in ids[:-1]:
        stream.push(token)
        assert stream.take() == ""
    stream.push(ids[-1])
    assert stream.take() == "🙂"


def test_an_answer_cut_inside_a_character_ends_in_a_replacement() -> None:
    stream = TextStream(TOKENIZER)
    for token in ids_of("a🙂")[:-1]:
        stream.push(token)
    assert stream.take() == "a" and stream.finish() == "\ufffd"


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
