"""What a backbone writes in the user's place: the frame of the template, what falls out, and that numbers decide alone."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import medusa
from medusa.engine import Engine
from pipelines.config import BackboneSection, DistillSection, SelfPromptSection
from pipelines.errors import ConfigError, StageError
from pipelines.pool import Pool
from pipelines.self_prompt import (
    WRITTEN,
    NearDuplicates,
    OpenTurn,
    _grams,
    _normal,
    _read,
    choose,
    fault_of,
    open_turn,
    settings_key,
    similarity,
    write_turns,
)
from tests.tiny_models import make_tiny_tokenizer

SECTION = SelfPromptSection(num=4, max_tokens=20)
SENTENCES = (
    "How do I repair a leaking kitchen tap without calling a plumber?",
    "How do I repair a leaking kitchen tap without calling any plumber?",
    "Explain photosynthesis to a curious child in two short paragraphs.",
    "Write a Python function that merges two sorted lists of numbers.",
)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> medusa.Model:
    return medusa.load(tiny_folder, heads=None, dtype="float32")


def _rows(*texts: str, **changed: Any) -> list[dict[str, Any]]:
    return [{"number": str(i), "text": text, "fault": None, "error": None} | changed for i, text in enumerate(texts)]


def test_the_frame_is_the_template_around_the_users_words() -> None:
    tokenizer = make_tiny_tokenizer()
    frame = open_turn(tokenizer)
    words = list(tokenizer("hello there", add_special_tokens=False)["input_ids"])
    whole = tokenizer.apply_chat_template([{"role": "user", "content": "hello there"}], tokenize=True, return_dict=True)
    ids = [*frame.prefix_ids, *words, *frame.closing_ids]
    assert list(whole["input_ids"])[: len(ids)] == ids
    assert frame == OpenTurn(prefix_ids=frame.prefix_ids, closing="<|im_end|>", closing_ids=(2,))


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }}", "always the same"])
def test_a_template_that_has_no_user_turn_is_refused(template: str | None) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(StageError, match=r"prompts\.path"):
        open_turn(tokenizer)


def test_a_turn_depends_on_its_number_and_the_seed_alone(model: medusa.Model) -> None:
    def written(numbers: list[str], size: int, seed: int = 0) -> dict[str, list[int]]:
        engine = Engine(model.backbone, max_batch_size=size, context_length=128)
        rows = write_turns(model, engine, numbers, SECTION.model_copy(update={"seed": seed}))
        pa.Table.from_pylist([row | {"settings": ""} for row in rows], schema=WRITTEN).validate(full=True)
        return {row["number"]: row["response_ids"] for row in rows}

    together = written([str(i) for i in range(6)], 4)
    assert written(["5", "2"], 1) == {number: together[number] for number in ("5", "2")}
    assert len({tuple(ids) for ids in together.values()}) == 6
    assert written(["2"], 1, seed=1)["2"] != together["2"]


def test_a_turn_ends_at_the_templates_own_mark_where_that_is_no_end_of_sequence(model: medusa.Model) -> None:
    tokenizer = model.backbone.tokenizer
    before = tokenizer.chat_template
    tokenizer.chat_template = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + 'e' }}{% endfor %}"
    try:
        rows = write_turns(
            model, Engine(model.backbone, max_batch_size=8, context_length=250), map(str, range(24)),
            SelfPromptSection(max_tokens=200, temperature=2.0, top_p=1.0),
        )  # fmt: skip
    finally:
        tokenizer.chat_template = before
    (closing,) = tokenizer("e", add_special_tokens=False)["input_ids"]
    stopped = [row for row in rows if row["response_ids"][-1] == closing]
    assert stopped
    assert all(row["finish_reason"] == "stop" and "e" not in row["text"] for row in stopped)


@pytest.mark.parametrize(
    ("text", "finished", "fault"),
    [
        (SENTENCES[0], True, None),
        ("光合作用是怎样进行的?请用简单的话解释。", True, None),
        (SENTENCES[0], False, "cut off"),
        ("What <|im_start|>assistant is it, and why is it here?", True, "template tokens"),
        ("Why? ... !!", True, "too short"),
        ("", True, "too short"),
        ("the same words again " * 8, True, "repetitive"),
        ("a" * 60, True, "repetitive"),
    ],
)
def test_degenerate_turns_are_told_by_their_fault(text: str, finished: bool, fault: str | None) -> None:
    assert fault_of(text, finished=finished, special=["<|im_start|>", "<|im_end|>"]) == fault


def test_the_first_of_near_duplicates_stays_and_all_reasons_are_counted() -> None:
    rows = _rows(*SENTENCES) + _rows("x", fault="too short") + _rows("y", error="no room")
    chosen = choose(rows, SECTION)
    assert [prompt.turns[0] for prompt in chosen.prompts] == [SENTENCES[0], *SENTENCES[2:]]
    assert chosen.dropped == {"near-duplicate": 1, "too short": 1, "failed": 1}
    assert chosen.summary == "3 of 6 written prompts kept (dropped: failed 1, near-duplicate 1, too short 1)"
    assert [prompt.id for prompt in chosen.prompts] == ["self-0-0", "self-0-2", "self-0-3"]


def test_a_turn_like_a_given_prompt_falls_out() -> None:
    chosen = choose(
        _rows(*SENTENCES), SECTION, given=["how do I repair a LEAKING kitchen tap, without calling a plumber"]
    )
    assert [prompt.turns[0] for prompt in chosen.prompts] == list(SENTENCES[2:])


def test_more_numbers_never_change_what_fewer_gave() -> None:
    for few, many in pairwise(range(len(SENTENCES) + 1)):
        first, second = (choose(_rows(*SENTENCES[:count]), SECTION).prompts for count in (few, many))
        assert second[: len(first)] == first


@given(
    st.lists(st.text(alphabet="ab ", min_size=1, max_size=14), max_size=12),
    st.sampled_from([0.1, 0.3, 1 / 3, 0.5, 0.75, 1.0]),
)
def test_prefix_filtering_finds_what_comparing_all_pairs_finds(texts: list[str], limit: float) -> None:
    fast, kept = NearDuplicates(limit), list[frozenset[int]]()
    for text in texts:
        grams = _grams(_normal(text))
        new = all(similarity(grams, other) < limit for other in kept)
        if new:
            kept.append(grams)
        assert fast.add(text) == new


def test_turns_of_another_dtype_are_refused_and_those_that_name_none_stand(tmp_path: Path) -> None:
    pool = Pool(folder=tmp_path, key="number", worker=object, args=(), settings=DistillSection())
    wanted = {dtype: settings_key(SECTION, BackboneSection(dtype=dtype)) for dtype in ("auto", "bfloat16", "int8")}
    assert wanted["auto"] == wanted["bfloat16"]
    earlier = {name: value for name, value in json.loads(wanted["int8"]).items() if name != "dtype"}
    for settings in (json.dumps(earlier, sort_keys=True), wanted["int8"]):
        row = {"number": "0", "text": "t", "response_ids": [1], "settings": settings}
        pq.write_table(pa.Table.from_pylist([row], schema=WRITTEN), tmp_path / "0.parquet")
        assert [row["text"] for row in _read(pool, wanted["int8"], 1)] == ["t"]
        if settings == wanted["int8"]:
            with pytest.raises(ConfigError, match=r'written with .*"dtype": "int8".*asked for is .*"bfloat16"'):
                list(_read(pool, wanted["auto"], 1))
        else:
            assert list(_read(pool, wanted["auto"], 1))
