from __future__ import annotations

import errno
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from medusa.errors import MedusaError
from pipelines import calibrate, evaluate, register, train
from pipelines import run as run_module
from pipelines.config import Config, load_config
from pipelines.errors import StageError
from pipelines.stage import Progress, Step, ignore_progress, main, polled, unrepeated


@dataclass(frozen=True)
class _Result:
    summary: str


def _echo(config: Config, progress: Progress = ignore_progress) -> _Result:
    return _Result(f"{config.train.steps} steps")


def _fails(config: Config, progress: Progress = ignore_progress) -> _Result:
    raise MedusaError("no good: value 3, limit 2; lower it")


def _writes(config: Config, progress: Progress = ignore_progress) -> _Result:
    config.layout.root.mkdir(parents=True)
    return _Result("written")


def _denied(config: Config, progress: Progress) -> _Result:
    raise PermissionError(errno.EACCES, "Permission denied")


def _runs(config: Config, progress: Progress = ignore_progress) -> _Result:
    return run_module._stage("train", _denied, config, run_module.named(progress))


def _refused(config: Config, progress: Progress = ignore_progress) -> _Result:
    from mlflow.exceptions import MlflowException

    raise MlflowException.invalid_parameter_value("a key twice")


def test_a_stage_prints_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    main("echo", _echo, ["train.steps=7"])
    assert capsys.readouterr().out == "7 steps\n"


def test_overrides_may_stand_on_either_side_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("train: {steps: 5}\n")
    main("echo", _echo, ["train.seed=1", "--config", str(file), "train.steps=6"])
    assert capsys.readouterr().out == "6 steps\n"


@pytest.mark.parametrize("arguments", [["train.stepz=7"], ["--config", "/no/such.yaml"], ["train.steps=-1"]])
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main("echo", _echo, arguments)
    told = capsys.readouterr().err
    assert caught.value.code == 2
    assert told.startswith("error: echo failed: ")
    assert told.count("\n") == 1


def test_an_error_of_the_stage_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main("fails", _fails, [])
    assert (caught.value.code, capsys.readouterr().err) == (
        2,
        "error: fails failed: no good: value 3, limit 2; lower it\n",
    )


def test_a_workdir_that_cannot_be_written_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as caught:
        main("register", _writes, [f"workdir={tmp_path / 'file' / 'work'}"])
    told = capsys.readouterr().err
    assert caught.value.code == 2
    assert told.startswith("error: register failed: ") and str(tmp_path / "file") in told and told.count("\n") == 1


def test_a_stage_of_several_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main("run", _runs, [f"workdir={tmp_path}"])
    assert capsys.readouterr().err == "error: train failed: [Errno 13] Permission denied\n"


def test_what_mlflow_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main("register", _refused, [])
    assert (caught.value.code, capsys.readouterr().err) == (
        2,
        "error: register failed: MLflow refuses: a key twice\n",
    )


@pytest.mark.parametrize(
    ("stage", "needed"), [(train, "distill"), (calibrate, "distill"), (evaluate, "train"), (register, "train")]
)
def test_a_stage_without_what_it_reads_names_the_stage_that_makes_it(
    stage: object, needed: str, tmp_path: Path
) -> None:
    config = load_config(None, [f"workdir={tmp_path / 'empty'}"])
    with pytest.raises(StageError, match=f"run `{needed}` first"):
        stage.run(config)  # type: ignore[attr-defined]


def test_progress_is_told_once_while_the_block_works_and_a_failing_reading_stops_nothing() -> None:
    told: list[Step] = []
    readings = iter([Step(done=1, total=3), Step(done=1, total=3), None, Step(done=2, total=3)])

    def read() -> Step:
        step = next(readings)
        if step is None:
            raise OSError("not there yet")
        return step

    with polled(read, told.append, interval_s=0.01):
        deadline = time.monotonic() + 10
        while len(told) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert [step.done for step in told] == [1, 2]


def test_a_step_that_was_just_told_is_not_told_again() -> None:
    told: list[Step] = []
    tell = unrepeated(told.append)
    steps = [Step(done=0, total=2), Step(done=0, total=2), Step(done=0, total=2, note="more"), Step(done=0, total=2)]
    for step in steps:
        tell(step)
    assert told == [steps[0], *steps[2:]]
