"""Distillation on real Ray with a tiny backbone: killed anywhere with SIGKILL, every prompt is answered exactly once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import medusa
from pipelines import distill
from pipelines.cluster import ray_session
from pipelines.config import Config, load_config
from pipelines.errors import StageError
from pipelines.pool import RUN
from pipelines.records import UNUSED, scan
from pipelines.registry import open_registry
from pipelines.self_prompt import self_prompts
from pipelines.stage import Step, ignore_progress

NUM_PROMPTS = 120
FINISHES = ("stop", "length", "error")
WAIT_S = 240.0  # for a machine that does other work besides


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One and two turns, some sampled, and one that no context can hold."""
    file = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    rows = [
        {"id": f"p{i}", "turns": [f"question {i}", "and then?"][: 1 + i % 2], "temperature": [None, 1.0][i % 3 == 0]}
        for i in range(NUM_PROMPTS - 1)
    ]
    rows.append({"id": "bad", "turns": ["fine", "word " * 400]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def settings(tiny_folder: Path, prompts: Path, tmp_path: Path) -> list[str]:
    return [
        f"workdir={tmp_path / 'work'}",
        f"backbone.name={tiny_folder}",
        "backbone.dtype=float32",
        f"prompts.path={prompts}",
        "distill.heads=none",
        "distill.max_tokens=24",
        "distill.context_length=250",
        "distill.rows_per_file=4",
        "distill.num_actors=2",
        "distill.threads=1",
        "ray.object_store_mb=128",
    ]


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    with ray_session(load_config(None, ["ray.object_store_mb=128"])):
        yield


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for never came"
        time.sleep(0.02)


def _files(config: Config) -> int:
    return len(list(config.layout.distilled.glob(f"{RUN}*/*.parquet")))


def _workers(*names: str) -> list[psutil.Process]:
    """Ray's processes below this one whose title bears one of the names."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::") and any(name in title for name in names):
            found.append(process)
    return found


def _each_prompt_once(config: Config) -> None:
    """Every turn of every prompt has one row, in all files together; only the bad prompt's second turn failed."""
    rows = list(scan(config.layout.distilled))
    turns = [f"p{i}" for i in range(NUM_PROMPTS - 1)] + [f"p{i}/2" for i in range(NUM_PROMPTS - 1) if i % 2]
    assert Counter(row["id"] for row in rows) == Counter([*turns, "bad", "bad/2"])
    assert [row["id"] for row in rows if row["error"] is not None] == ["bad/2"]
    assert not list(config.layout.distilled.glob(f"{RUN}*"))


def test_a_killed_driver_loses_nothing_that_was_written_and_repeats_nothing(settings: list[str]) -> None:
    config = load_config(None, settings)
    command = [sys.executable, "-m", "pipelines.distill", *settings]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait(lambda: _files(config) >= 3 or driver.poll() is not None)
        assert driver.poll() is None, "it ended before it could be killed"
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    again = subprocess.run(command, capture_output=True, text=True, check=True, timeout=2 * WAIT_S)
    asked = int(again.stdout.partition(" asked now")[0].rpartition("prompts: ")[2])
    assert 0 < asked <= NUM_PROMPTS - 8, again.stdout  # a file may be torn, not more
    _each_prompt_once(config)


@pytest.mark.usefixtures("_ray")
def test_killed_actors_and_writers_are_replaced_and_the_run_ends_as_if_they_had_lived(
    settings: list[str], tiny_folder: Path
) -> None:
    config = load_config(None, settings)
    steps: list[Step] = []
    outcome: list[distill.DistillResult] = []
    work = threading.Thread(target=lambda: outcome.append(distill.run(config, steps.append)), daemon=True)
    work.start()
    killed: list[int] = []
    for names, after in ((("Answerer",), 2), (("ray::Write", "ray::IDLE"), 6), (("Answerer",), 10)):
        _wait(lambda after=after: _files(config) >= after or not work.is_alive())
        doomed = [process for process in _workers(*names) if process.pid not in killed]
        for process in doomed[:1] if names == ("Answerer",) else doomed:
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)
    assert len(killed) >= 2, "the actors were not found"
    work.join(WAIT_S)
    (result,) = outcome
    _each_prompt_once(config)
    assert (result.num_asked, result.num_failed) == (NUM_PROMPTS, 1)
    assert steps[-1].done == steps[-1].total == NUM_PROMPTS
    assert "tokens/s" in steps[-1].note
    assert "length" in steps[-1].note

    model = medusa.load(tiny_folder, heads=None, dtype="float32")
    for row in list(scan(config.layout.distilled))[::40]:
        if row["error"] is None:
            sampling = {name: row[name] for name in ("temperature", "top_p", "seed")}
            alone = model.generate(row["prompt_ids"], max_tokens=24, acceptance="rejection", **sampling)
            assert alone.token_ids == row["response_ids"]

    logged = _run_of(config)
    assert logged["tokens"] == sum(len(row["response_ids"]) for row in scan(config.layout.distilled, ["response_ids"]))
    assert logged["finish_error"] == 1
    assert logged["tokens_per_s"] > 0


@pytest.mark.usefixtures("_ray")
def test_only_failed_rows_are_asked_again_and_the_run_stays_one(settings: list[str], tmp_path: Path) -> None:
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps({"id": name, "prompt": name * 30}) + "\n" for name in "abcde"))
    few = [*settings, f"prompts.path={file}", "distill.context_length=48"]
    first = distill.run(load_config(None, few))
    assert (first.num_answers, first.num_failed) == (0, 5)
    wide = load_config(None, [*few, "distill.context_length=250"])
    assert distill.run(wide).num_asked == 0
    retried = distill.run(load_config(None, [*few, "distill.context_length=250", "distill.retry_errors=true"]))
    assert (retried.num_asked, retried.num_answers, retried.num_failed) == (5, 5, 0)
    assert Counter(row["id"] for row in scan(wide.layout.distilled)) == Counter("abcde")
    assert _run_of(wide)["tokens"] == retried.num_tokens


@pytest.mark.usefixtures("_ray")
def test_after_each_rerun_the_run_tells_of_all_answers_in_use(settings: list[str], tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"

    def distilled(names: str, *overrides: str) -> distill.DistillResult:
        file.write_text("".join(json.dumps({"id": name, "prompt": name * 30}) + "\n" for name in names))
        config = load_config(None, [*settings, f"prompts.path={file}", *overrides])
        result, logged = distill.run(config), _run_of(config)
        rows = [row for row in scan(config.layout.distilled) if row["part"] != UNUSED]
        reasons = Counter("error" if row["error"] is not None else row["finish_reason"] for row in rows)
        assert logged["tokens"] == sum(len(row["response_ids"]) for row in rows)
        assert {name: logged.get(f"finish_{name}", 0) for name in FINISHES} == {
            name: reasons[name] for name in FINISHES
        }
        return result

    assert distilled("ab", "distill.context_length=48").num_failed == 2
    assert distilled("abc").num_asked == 1
    assert distilled("abcd", "distill.retry_errors=true").num_asked == 3
    assert distilled("e").num_asked == 1  # fewer than were told of before


@pytest.mark.usefixtures("_ray")
def test_what_keeps_an_actor_from_loading_ends_the_run_with_its_reason(settings: list[str]) -> None:
    with pytest.raises(StageError, match=r"lower distill\.batch_size or distill\.context_length") as caught:
        distill.run(config := load_config(None, [*settings, "distill.batch_size=100000000"]))
    assert "\n" not in str(caught.value)
    assert _run_of(config, status="FAILED")["tokens"] == 0


@pytest.mark.usefixtures("_ray")
def test_a_backbone_writes_its_own_prompts_the_same_after_a_death(settings: list[str], tmp_path: Path) -> None:
    own = [
        *(one for one in settings if not one.startswith("prompts.path")),
        "prompts.self_prompt.num=6",
        "prompts.self_prompt.max_tokens=40",
        "prompts.self_prompt.temperature=1.5",
        "prompts.self_prompt.max_tries=8",
        "prompts.calibration_share=0.2",
    ]
    config = load_config(None, own)
    written = self_prompts(config, ignore_progress)
    assert 0 < len(written) <= 6
    folder = config.layout.root / "self-prompts"
    files = sorted(folder.glob("*.parquet"))
    files[0].unlink()
    assert self_prompts(config, ignore_progress) == written
    elsewhere = load_config(
        None, [*own, f"workdir={tmp_path / 'other'}", "distill.batch_size=3", "distill.rows_per_file=9"]
    )
    assert self_prompts(elsewhere, ignore_progress) == written
    result = distill.run(config)
    assert (result.num_asked, result.num_failed) == (len(written), 0)


def _run_of(config: Config, *, status: str = "FINISHED") -> dict[str, float]:
    """Last metrics of the one run that a working directory's registry holds."""
    registry = open_registry(config)
    (run,) = registry._client.search_runs([registry._experiment_id])
    assert run.info.status == status
    return dict(run.data.metrics)
