"""One engine behind standard input and output. Runs in that engine's environment: imports nothing of this project.

    python lines.py ENGINE.py SETTINGS

ENGINE.py defines `Engine(**SETTINGS)` with a `version` and `answer(prompts, num_tokens)`, which gives the token ids of
each prompt's answer and its verify steps, or None where there is no telling. Then, a line of JSON each:

    out, once it is loaded   {"version": "vLLM 0.32.0"}
    in                       {"prompts": [[1, 2], [3]], "num_tokens": 4}
    out                      {"token_ids": [[…], […]], "wall_s": 0.25, "num_steps": 7}

It ends where the input ends. An error ends it too: the last lines of standard error say which.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from typing import Any, TextIO


def load_engine(path: str, settings: dict[str, Any]) -> Any:
    spec = importlib.util.spec_from_file_location("engine", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Engine(**settings)


def serve(engine: Any, questions: TextIO, answers: TextIO) -> None:
    """Answer line by line; the clock runs from prompts in memory to token ids in memory."""
    _say(answers, {"version": engine.version})
    for line in questions:
        asked = json.loads(line)
        start = time.perf_counter()
        token_ids, num_steps = engine.answer(asked["prompts"], asked["num_tokens"])
        wall_s = time.perf_counter() - start
        _say(answers, {"token_ids": token_ids, "wall_s": wall_s, "num_steps": num_steps})


def _say(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def main() -> None:
    # Engines print. What they print goes to standard error, so that standard output carries answers alone.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(load_engine(sys.argv[1], json.loads(sys.argv[2])), sys.stdin, answers)


if __name__ == "__main__":  # engines that spawn processes import this file again
    main()
