"""Prompt files in the shapes that benchmarks come in."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.prompts import built_in, read_prompts


def test_every_shape_is_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"id": "a", "category": "math", "turns": ["first", "second"]}\n'
        "\n"
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, '
        '{"role": "assistant", "content": "x"}]}\n'
        '{"prompt": "p"}\n'
    )
    turns, messages, prompt = read_prompts(path)
    assert (turns.id, turns.category, turns.messages[0]["content"]) == ("a", "math", "first")
    assert [m["role"] for m in messages.messages] == ["system", "user"], "an answer that is there already is cut off"
    assert prompt.messages == ({"role": "user", "content": "p"},)
    assert len(read_prompts(path, limit=1)) == 1


@pytest.mark.parametrize("line", ["not json", "[]", '{"turns": []}', '{"text": "?"}', '{"messages": []}'])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl:2"):
        read_prompts(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.touch()
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts(path)


def test_built_in_prompts_differ() -> None:
    assert len({prompt.id for prompt in built_in()}) == len(built_in()) >= 5
