"""All that wants a GPU, in one script: a part that hangs or fails costs the others nothing, and its commands are known ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from benchmarks.gpu import speed_default, step_cost, train_default

SCRIPT = Path(step_cost.__file__).with_name("all.sh")
# Notes what it was called with; what steps cost hangs, MEDUSA-1 fails.
FAKE_PYTHON = """#!{python}
import json, sys, time
with open({calls!r}, "a") as calls:
    print(json.dumps(sys.argv[1:]), file=calls)
if "benchmarks.gpu.step_cost" in sys.argv:
    time.sleep(100)
if "train" in sys.argv and "--rank" not in sys.argv:
    sys.exit("no memory")
"""

pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="no coreutils here")


def run_script(
    folder: Path, *parts: str, prompts: str = '{"prompt": "Hi"}\n', **environment: str
) -> subprocess.CompletedProcess[str]:
    python = folder / "python"
    python.write_text(FAKE_PYTHON.format(python=sys.executable, calls=str(folder / "calls")))
    python.chmod(0o755)
    (folder / "prompts.jsonl").write_text(prompts)
    command = ["bash", str(SCRIPT), str(folder / "out"), str(folder / "prompts.jsonl"), *parts]
    return subprocess.run(
        command,
        env=os.environ | {"PYTHON": str(python)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_part_is_tried_and_how_it_ended_is_told(tmp_path: Path, device: str) -> None:
    done = run_script(tmp_path, DEVICE=device, SCALE="0.01", TRAIN_PROMPTS=str(tmp_path / "prompts.jsonl"))
    assert done.returncode == 1
    ends = dict(line.split(": ", 1) for line in (tmp_path / "out" / "parts.txt").read_text().splitlines())
    assert done.stdout.splitlines() == [f"{name}: {end}" for name, end in ends.items()]
    assert ends["steps"] == "stopped at its limit of 1.5 s"
    assert ends["medusa1"].startswith("failed with 1 after ") and ends["medusa1"].endswith("s: no memory")
    others = {"tests", "speed", "batches", "answer", "medusa2"}
    others |= {"speed-fused", "batches-fused"} if device == "cuda" else set()
    assert set(ends) == others | {"steps", "medusa1"} and all(ends[name].startswith("done") for name in others)

    commands = {train_default.__name__: get_command(train_default.app)}
    for module in (speed_default, step_cost):
        app = typer.Typer()
        app.command()(module.main)
        commands[module.__name__] = get_command(app)
    for _, module, *arguments in calls(tmp_path)[1:]:  # the first are pytest's
        command = commands[module]
        if module == train_default.__name__:
            command = command.commands[arguments.pop(0)]
        assert command.make_context(module, arguments).params["device"] == device


def test_parts_are_chosen_by_name_and_slips_cost_no_time(tmp_path: Path) -> None:
    assert run_script(tmp_path, "speed", SCALE="0.1").returncode == 0
    assert [call[1] for call in calls(tmp_path)] == ["benchmarks.gpu.speed_default"] * 2
    (tmp_path / "calls").write_text("")
    wrong = run_script(tmp_path, "speed", "stesp")
    assert wrong.returncode == 2 and "no part stesp" in wrong.stderr
    untaught = run_script(tmp_path, "speed", "heads", TRAIN_PROMPTS="")
    assert untaught.returncode == 2 and "TRAIN_PROMPTS" in untaught.stderr
    empty = run_script(tmp_path, prompts="")
    assert empty.returncode == 2 and "usage: " in empty.stderr
    assert not calls(tmp_path)
