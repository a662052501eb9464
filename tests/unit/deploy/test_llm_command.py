"""Simon Willison's `llm` at a terminal, told of our server as its manual says: it converses, whole and streamed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.request_log import access_logger
from medusa import Model


def llm(folder: Path, url: str, *arguments: str) -> str:
    """What the command prints; `folder` holds its settings and its log of the conversation."""
    served = {"model_id": "medusa", "model_name": "tiny", "api_base": f"{url}/v1"}
    (folder / "extra-openai-models.yaml").write_text(json.dumps([served]))  # JSON is YAML
    command = [sys.executable, "-m", "llm", "--model", "medusa", "--key", "unused", *arguments]
    done = subprocess.run(command, env={**os.environ, "LLM_USER_PATH": str(folder)}, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_a_chat_is_streamed_and_goes_on_whole(
    url: str, model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger=access_logger.name)
    options = ["-o", "temperature", "0", "-o", "max_tokens", "24"]
    turns: list[dict[str, Any]] = []
    for text, more in (("Why is the sky blue?", []), ("And at night?", ["--continue", "--no-stream"])):
        printed = llm(tmp_path, url, *options, *more, text)
        turns.append({"role": "user", "content": text})
        expected = model.generate(turns, max_tokens=24).text
        assert printed == expected + "\n"
        turns.append({"role": "assistant", "content": expected})
    lines = [json.loads(record.message) for record in caplog.records if record.name == access_logger.name]
    assert [(line["status"], line["stream"]) for line in lines] == [(200, True), (200, False)]
