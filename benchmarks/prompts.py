"""Prompts to measure on: a built-in set, or a JSONL file. Knows chat messages; knows no model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUILT_IN = {
    "writing": "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "explaining": "Explain how a refrigerator keeps food cold, step by step, to a curious ten-year-old.",
    "mathematics": "A train goes 180 km in 2.5 hours, then 120 km in 1.5 hours. What is its average speed?",
    "code": "Write a Python function that returns the n-th Fibonacci number without recursion, and explain it.",
    "lists": "Give me ten practical tips for sleeping better, one sentence each.",
    "rewriting": "Make this friendlier and longer: 'Your order is late. We know. It will arrive on Friday.'",
}


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One conversation that ends with a user turn."""

    id: str
    category: str
    messages: tuple[dict[str, str], ...]


def built_in() -> list[Prompt]:
    return [
        Prompt(id=name, category=name, messages=({"role": "user", "content": text},)) for name, text in BUILT_IN.items()
    ]


def read_prompts(path: Path, *, limit: int | None = None) -> list[Prompt]:
    """Rows with `messages` (cut after the last user turn), `turns` (the first is asked) or `prompt`.

    ValueError names the line of a row that is none of these.
    """
    if not path.is_file():
        raise ValueError(f"no prompts file at {path}; give a JSONL file, or leave it out for the built-in prompts")
    prompts: list[Prompt] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if limit is not None and len(prompts) >= limit:
                break
            if line.strip():
                prompts.append(_parse(line, where=f"{path}:{number}", number=number))
    if not prompts:
        raise ValueError(f"{path} holds no prompts; give one JSON object with messages, turns or prompt per line")
    return prompts


def _parse(line: str, *, where: str, number: int) -> Prompt:
    try:
        row: dict[str, Any] = json.loads(line)
        messages = _messages(row)
    except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{where}: not a JSON object with messages, turns or prompt ({error!r})") from error
    if not messages:
        raise ValueError(f"{where}: the conversation has no user turn")
    return Prompt(
        id=str(row.get("id", f"line-{number}")), category=str(row.get("category", "all")), messages=tuple(messages)
    )


def _messages(row: dict[str, Any]) -> list[dict[str, str]]:
    if "messages" in row:
        messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in row["messages"]]
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        return messages
    text = row["turns"][0] if "turns" in row else row["prompt"]
    return [{"role": "user", "content": str(text)}]
