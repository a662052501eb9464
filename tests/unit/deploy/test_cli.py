"""The command line in-process: what it prints, and that whatever the user can mend is one line and exit code 2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import medusa
from deploy import demo
from deploy.api_keys import KeyRing
from deploy.cli import STAGES, app
from medusa.checkpoint import save_checkpoint
from pipelines.config import CONFIGS, Config
from pipelines.registry import open_registry
from tests.unit.medusa.tiny import random_heads

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def medusa_cli() -> Callable[..., Result]:
    def call(*args: Any, input: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(arg) for arg in args], input=input)

    return call


@pytest.fixture(scope="session")
def heads_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random heads for the tiny backbone."""
    backbone = medusa.load(tiny_folder, heads=None, dtype="float32").backbone
    return save_checkpoint(
        tmp_path_factory.mktemp("heads") / "tiny",
        random_heads(backbone),
        paths=[(0,), (1,), (0, 0)],
        backbone_name=backbone.name,
        backbone_fingerprint=backbone.fingerprint,
    )


@pytest.fixture
def tiny(tiny_folder: Path, heads_folder: Path) -> list[Any]:
    return ["--backbone", tiny_folder, "--heads", heads_folder, "--dtype", "float32", "--max-tokens", 16]


def assert_one_line_error(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("medusa: error: "), result.stderr
    assert sum(line.startswith("medusa: error") for line in lines) == 1
    assert "Traceback" not in result.output
    for word in words:
        assert word in lines[-1]
    assert result.stdout == ""


def test_json_is_one_object_and_plain_agrees(medusa_cli: Callable[..., Result], tiny: list[Any]) -> None:
    tree, plain = (medusa_cli("generate", "Hello", "--json", *tiny, *extra) for extra in ([], ["--plain"]))
    assert (tree.exit_code, plain.exit_code) == (0, 0), tree.output
    fields = json.loads(tree.stdout)
    assert fields.keys() == {
        "text", "token_ids", "finish_reason", "acceleration_rate", "num_steps", "num_tokens", "tokens_per_s", "prefill_s",
    }  # fmt: skip
    assert fields["token_ids"] == json.loads(plain.stdout)["token_ids"]
    assert fields["num_tokens"] == len(fields["token_ids"]) == 16
    assert json.loads(plain.stdout)["acceleration_rate"] == 1


def test_streaming_prints_the_answer_alone_on_stdout(medusa_cli: Callable[..., Result], tiny: list[Any]) -> None:
    text = json.loads(medusa_cli("generate", "Hello", "--json", *tiny).stdout)["text"]
    streamed = medusa_cli("generate", "Hello", *tiny)
    assert streamed.stdout == f"{text}\n"
    assert "tokens/s" in streamed.stderr


def test_messages_file(medusa_cli: Callable[..., Result], tiny: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "messages.json"
    file.write_text(json.dumps([{"role": "user", "content": "Hello"}]))
    from_file = medusa_cli("generate", "--messages", file, "--json", *tiny)
    assert (
        json.loads(from_file.stdout)["text"]
        == json.loads(medusa_cli("generate", "Hello", "--json", *tiny).stdout)["text"]
    )


def test_sampling_options_reach_the_model(medusa_cli: Callable[..., Result], tiny: list[Any]) -> None:
    def ask(*extra: Any) -> list[int]:
        return json.loads(medusa_cli("generate", "Hello", "--json", *tiny, *extra).stdout)["token_ids"]

    warm = ("--temperature", 1.0, "--seed", 4)
    rejection = ask(*warm, "--acceptance", "rejection")
    assert rejection == ask(*warm, "--acceptance", "rejection", "--tree", 2)
    assert rejection != ask()
    assert rejection != ask(*warm, "--acceptance", "rejection", "--seed", 5)
    assert ask(*warm, "--epsilon", 0.5, "--delta", 0.9, "--top-k", 20, "--top-p", 0.9)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generate", ""], ["prompt is empty"]),
        (["generate", "x " * 400], ["prompt has", "shorten"]),
        (["generate", "Hi", "--max-tokens", 0], ["max_tokens", "got 0"]),
        (["generate", "Hi", "--max-tokens", 100_000], ["max_tokens 100000", "or less"]),
        (["generate", "Hi", "--acceptance", "lucky"], ["'lucky'", "greedy, typical, rejection"]),
        (["generate", "Hi", "--epsilon", 0], ["epsilon", "(0, 1]"]),
        (["generate", "Hi", "--epsilon", 1.5], ["epsilon", "1.5"]),
        (["generate", "Hi", "--temperature", -1], ["temperature", "-1"]),
        (["generate", "Hi", "--temperature", 0.7, "--acceptance", "greedy"], ["'greedy'", "0.7"]),
        (["chat", "--temperature", 0.7, "--acceptance", "greedy"], ["'greedy'", "0.7"]),
        (["generate", "Hi", "--dtype", "float7"], ["'float7'", "float32"]),
        (["generate", "Hi", "--tree", 99], ["tree", "99"]),
        (["generate", "Hi", "--tree", 2, "--plain"], ["--plain", "--tree"]),
        (["generate", "Hi", "--stop", ""], ["stop", "empty"]),
        (["generate", "Hi", "--heads", "nowhere"], ["no heads folder at nowhere"]),
        (["generate", "Hi", "--backbone", "nowhere/at-all"], ["nowhere/at-all"]),
        (["generate", "Hi", "--messages", "m.json"], ["one of the two"]),
        (["generate"], ["one of the two"]),
        (["generate", "--messages", "nowhere.json"], ["nowhere.json", "No such file"]),
        (["generate", "Hi", "--max-tokens", "many"], ["--max-tokens", "integer", "got 'many'"]),
        (["generate", "Hi", "--temperature", "warm"], ["--temperature", "number", "got 'warm'"]),
        (["generate", "Hi", "--device", "tpu"], ["'--device': 'tpu' is not one of 'cpu', 'cuda'"]),
        (["serve", "--port", "3.5"], ["--port", "integer", "got '3.5'"]),
        (["generate", "Hi", "--surprise"], ["--surprise"]),
        (["genrate"], ["genrate", "generate"]),
        (["train", "--config", "nowhere.yaml"], ["nowhere.yaml", "laptop"]),
        (["train", "train.stepz=3"], ["train.stepz", "train.steps"]),
        (["train", "train.steps=0"], ["train.steps", "got 0"]),
        (["train", "nonsense"], ["section.key=value"]),
        (["serve", "--port", 99_999], ["serve.port", "99999"]),
        (["serve", "--host", "203.0.113.9", "--port", 0], ["cannot listen on 203.0.113.9"]),
        (["provision", "--wheel", "nowhere.whl"], ["nowhere.whl"]),
    ],
    ids=lambda value: " ".join(str(item)[:20] for item in value),
)
def test_bad_input_is_one_line_and_exit_code_2(
    medusa_cli: Callable[..., Result], tiny: list[Any], args: list[Any], words: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path))
    defaults = [arg for pair in zip(tiny[::2], tiny[1::2], strict=True) if pair[0] not in args for arg in pair]
    result = medusa_cli(*args, *(defaults if args[0] == "generate" else []))
    assert_one_line_error(result, *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"role": "user",\n "content": }]', ["line 2 column"]),
        ("[]", ["array of messages"]),
        ('{"role": "user"}', ["array of messages"]),
        ('[{"role": "user"}]', ["message 0", '"content"']),
        ('[{"role": "user", "content": 5}]', ["message 0"]),
        ('[{"role": "wizard", "content": "Hi"}]', ["message 0", "'wizard'", "system, user"]),
    ],
)
def test_malformed_messages_are_named(
    medusa_cli: Callable[..., Result], tiny: list[Any], tmp_path: Path, content: str, words: list[str]
) -> None:
    file = tmp_path / "messages.json"
    file.write_text(content)
    assert_one_line_error(medusa_cli("generate", "--messages", file, *tiny), *words)


def test_damaged_and_foreign_checkpoints(
    medusa_cli: Callable[..., Result], tiny: list[Any], heads_folder: Path, tmp_path: Path
) -> None:
    truncated, foreign = tmp_path / "truncated", tmp_path / "foreign"
    shutil.copytree(heads_folder, truncated)
    weights = truncated / "medusa_heads.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(heads_folder, foreign)
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, "backbone_fingerprint": "0" * 16}))

    without_heads = tiny[:2] + tiny[4:]
    assert_one_line_error(
        medusa_cli("generate", "Hi", "--heads", truncated, *without_heads), "medusa_heads.safetensors"
    )
    assert_one_line_error(medusa_cli("generate", "Hi", "--heads", foreign, *without_heads), "0" * 16, "force")
    assert medusa_cli("generate", "Hi", "--heads", foreign, "--force", *without_heads).exit_code == 0


def test_chat_remembers_and_ends(medusa_cli: Callable[..., Result], tiny: list[Any]) -> None:
    once = medusa_cli("chat", *tiny, input="Hello\n/exit\nnever read\n")
    assert once.exit_code == 0
    twice = medusa_cli("chat", *tiny, input="Hello\nHello\n")  # ends with the input
    assert twice.exit_code == 0
    reset = medusa_cli("chat", *tiny, input="Hello\n/reset\nHello\n/bogus\n")
    answer = once.stdout
    assert answer.strip()
    assert twice.stdout.startswith(answer)
    assert twice.stdout != answer * 2  # the second turn saw the first
    assert reset.stdout == answer * 2
    assert "unknown command /bogus" in reset.stderr


def test_a_full_conversation_says_so_and_goes_on(medusa_cli: Callable[..., Result], tiny: list[Any]) -> None:
    result = medusa_cli("chat", *tiny, input=f"{'x ' * 400}\nHello\n")
    assert result.exit_code == 0
    assert "fills the context" in result.stderr
    assert result.stdout.strip()


def test_every_stage_is_a_command(medusa_cli: Callable[..., Result]) -> None:
    listed = medusa_cli("--help").stdout
    assert {*STAGES, "generate", "chat", "provision", "serve", "demo", "registry", "version"} <= set(listed.split())


def test_an_empty_registry_is_listed_and_has_nothing_to_roll_back(
    medusa_cli: Callable[..., Result], tmp_path: Path
) -> None:
    listed = medusa_cli("registry", "list", f"workdir={tmp_path}")
    said = f"no version is registered in sqlite:///{tmp_path}/mlflow.db\n"
    assert (listed.exit_code, listed.stdout) == (0, said), listed.output
    assert json.loads(medusa_cli("registry", "list", "--json", f"workdir={tmp_path}").stdout) == []
    open_registry(Config(workdir=tmp_path))
    assert medusa_cli("registry", "list", f"workdir={tmp_path}").stdout == said
    assert_one_line_error(medusa_cli("promote", "--rollback", f"workdir={tmp_path}"), "no champion to go back from")
    assert_one_line_error(medusa_cli("promote", f"workdir={tmp_path}"), "challenger", "register")
    assert_one_line_error(medusa_cli("registry", "list", "registry.model_name=a/b"), "registry.model_name", "a/b")


@pytest.mark.parametrize(
    "command",
    [
        ["train"],
        ["calibrate"],
        ["calibrate", "ray.measure_on={CPU: 1}"],
        ["evaluate"],
        ["evaluate", "ray.measure_on={CPU: 1}"],
        ["register"],
        ["promote"],
        ["promote", "--rollback"],
    ],
    ids=" ".join,
)
def test_a_mistyped_workdir_is_named_and_not_made(
    medusa_cli: Callable[..., Result], command: list[str], tmp_path: Path
) -> None:
    nowhere = tmp_path / "medusa-wrok"
    assert_one_line_error(medusa_cli(*command, f"workdir={nowhere}"), str(nowhere))
    assert not list(tmp_path.iterdir())


def test_listing_makes_no_registry(medusa_cli: Callable[..., Result], tmp_path: Path) -> None:
    nowhere = tmp_path / "medusa-wrok"
    assert str(nowhere) in medusa_cli("registry", "list", f"workdir={nowhere}").stdout
    assert medusa_cli("registry", "list", "--json", f"workdir={nowhere}").stdout == "[]\n"
    assert not list(tmp_path.iterdir())


def test_a_new_key_opens_to_its_hash(medusa_cli: Callable[..., Result]) -> None:
    (_, key), (_, hashed) = (line.split() for line in medusa_cli("key", "new").stdout.splitlines())
    assert KeyRing([hashed]).opens(key)
    assert Config.model_validate({"serve": {"api_keys": [hashed]}}).serve.api_keys == (hashed,)
    assert key not in medusa_cli("key", "new").stdout


@pytest.mark.parametrize("asked", ["version", "--version"])
def test_version(medusa_cli: Callable[..., Result], asked: str) -> None:
    assert medusa_cli(asked).stdout.strip() == medusa.__version__


@pytest.mark.parametrize("group", [[], ["key"], ["registry"]])
def test_a_group_without_a_command_shows_its_help_as_an_error(
    medusa_cli: Callable[..., Result], group: list[str]
) -> None:
    result = medusa_cli(*group)
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) > 5 and "Commands:" in result.stderr
    assert_one_line_error(medusa_cli(*group, "--bogus"), "--bogus")


def test_help_names_every_shipped_configuration(medusa_cli: Callable[..., Result]) -> None:
    told, readme = medusa_cli("run", "--help").stdout, (ROOT / "README.md").read_text()
    for file in CONFIGS.glob("*.yaml"):
        assert file.stem in told
        assert f"`{file.stem}`" in readme


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; from typer.testing import CliRunner; from deploy.cli import app; "
        "assert CliRunner().invoke(app, ['generate', '--help']).exit_code == 0; "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    began = time.monotonic()
    outcome = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert outcome.returncode == 0, outcome.stderr
    assert not {"torch", "transformers", "ray", "mlflow", "fastapi", "pipelines"} & set(outcome.stdout.split())
    assert time.monotonic() - began < 10


def test_the_demo_streams_through_the_openai_client(url: str) -> None:
    seen: list[str] = []
    answer = demo.stream_one(url, "Hello", on_text=seen.append)
    assert answer.text == "".join(seen)
    assert len(seen) > 1
    assert 0 < answer.first_s < answer.total_s
    assert answer.num_tokens > 0
