"""`medusa …` as a user runs it: the console entry in a process of its own, the built-in backbone and its shipped heads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "Write a haiku about trees."
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def medusa_cli(*args: Any, cwd: Path = ROOT, input: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, input=input, capture_output=True, text=True, timeout=300)


def answer_of(*args: Any) -> dict[str, Any]:
    outcome = medusa_cli("generate", PROMPT, "--json", "--dtype", "float32", "--max-tokens", 32, *args)
    assert outcome.returncode == 0, outcome.stderr
    return json.loads(outcome.stdout)  # exactly one object, nothing beside it


def test_tree_and_plain_decoding_give_the_same_tokens() -> None:
    """The promise of the method, end to end: fewer steps, the same answer."""
    tree, plain = answer_of(), answer_of("--plain")
    assert tree["token_ids"] == plain["token_ids"]
    assert tree["text"] == plain["text"]
    assert tree["num_tokens"] == plain["num_tokens"] <= 32
    assert plain["acceleration_rate"] == 1
    assert tree["acceleration_rate"] > 1.2
    assert tree["num_steps"] < plain["num_steps"]


def test_chat_answers_and_ends_with_its_input() -> None:
    outcome = medusa_cli("chat", "--max-tokens", 8, input="Hello\n")
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.strip()
    assert "tokens/s" in outcome.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("generate", ""),
        ("generate", PROMPT, "--heads", "nowhere"),
        ("train", "--config", "nowhere.yaml"),
    ],
    ids=["empty prompt", "no heads", "no configuration"],
)
def test_bad_input_is_one_line_and_exit_code_2(args: tuple[str, ...], tmp_path: Path) -> None:
    outcome = medusa_cli(*args, cwd=tmp_path)
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("medusa: error: ")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_an_answer_without_a_traceback() -> None:
    command = [sys.executable, "-m", "deploy.cli", "generate", "Tell me a long story.", "--max-tokens", "2000"]
    with subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        rest, log = process.communicate(timeout=60)
    assert process.returncode == 130, log
    assert first + rest
    assert "Traceback" not in log
