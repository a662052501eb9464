"""Engines in processes of their own: the line protocol with a made-up engine, and what the real ones are told."""

from __future__ import annotations

import ast
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import medusa
from benchmarks import bench, peers
from benchmarks.contenders import Turn
from benchmarks.peers.engines import LLAMA, VLLM, VLLM_HEADS, Environments, parse_options, peer_launches
from benchmarks.peers.lines import load_engine
from benchmarks.peers.process import Launch, Peer
from medusa.checkpoint import save_checkpoint
from medusa.config import HeadsConfig
from medusa.heads import MedusaHeads

FOLDER = Path(peers.__file__).parent
ENGINE = """
import os, subprocess, sys, time

class Engine:
    version = "counting 1.0"

    def __init__(self, *, step):
        print("engines print what they like")
        if step == 0:
            raise ValueError("a step of 0 leads nowhere")
        self.step = step

    def answer(self, prompts, num_tokens):
        if prompts[0] == [0]:
            os._exit(7)
        if prompts[0] == [1]:
            self.below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            return [[self.below.pid]], None
        print("and again")
        return [[ids[-1] + self.step * (i + 1) for i in range(num_tokens)] for ids in prompts], num_tokens - 1
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Peer]]:
    file = tmp_path / "counting.py"
    file.write_text(ENGINE)
    started: list[Peer] = []

    def start(step: int = 1, **options: Any) -> Peer:
        launch = Launch(name="a peer", python=Path(sys.executable), engine=file, settings={"step": step})
        started.append(Peer(launch, folder=tmp_path, **options))
        return started[-1]

    yield start
    for peer in started:
        peer.close()


def state_of(pid: int) -> str:
    """R, S, T (stopped), …; empty for none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def wait_for(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_prompts_go_in_and_answers_come_out_whatever_the_engine_prints(start: Callable[..., Peer]) -> None:
    peer = start(step=2)
    peer.wait_ready()
    assert peer.version == "counting 1.0"
    for _ in range(2):
        turn = peer.answer([[5, 6], [9]], 3)
        assert turn == Turn(token_ids=((8, 10, 12), (11, 13, 15)), wall_s=turn.wall_s, num_steps=2)
        assert 0 <= turn.wall_s < 5


def test_it_sleeps_with_all_below_it_until_it_is_asked_and_leaves_nobody(start: Callable[..., Peer]) -> None:
    peer = start()
    peer.wait_ready()
    ((below,),) = peer.answer([[1]], 1).token_ids
    assert os.getpgid(below) != os.getpgid(0)
    wait_for(lambda: state_of(below) == "T")
    assert peer.answer([[3]], 2).token_ids == ((4, 5),)
    peer.close()
    wait_for(lambda: state_of(below) in ("", "Z"))


def test_one_that_dies_says_how_and_what_it_said_last(start: Callable[..., Peer]) -> None:
    peer = start()
    peer.wait_ready()
    with pytest.raises(ChildProcessError, match=r"a peer ended with exit code 7; its log ends: .*engines print"):
        peer.answer([[0]], 1)
    with pytest.raises(ChildProcessError, match="exit code 7"):
        peer.answer([[5]], 1)


def test_one_that_cannot_load_says_why(start: Callable[..., Peer]) -> None:
    with pytest.raises(ChildProcessError, match=r"exit code 1; .*ValueError: a step of 0 leads nowhere"):
        start(step=0).wait_ready()


def test_one_that_is_silent_is_not_waited_for_for_ever(start: Callable[..., Peer]) -> None:
    peer = start(ready_s=0.2)
    os.killpg(peer._process.pid, signal.SIGSTOP)
    with pytest.raises(TimeoutError, match=r"a peer said nothing for 0\.2 s"):
        peer.wait_ready()


def test_what_runs_in_other_environments_imports_nothing_of_this_project() -> None:
    ours = {"medusa", "pipelines", "deploy", "benchmarks", "tests"}
    for name in ("lines.py", "vllm_engine.py", "llama_engine.py"):
        for node in ast.walk(ast.parse((FOLDER / name).read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 and (node.module or "").split(".")[0] not in ours
            if isinstance(node, ast.Import):
                assert not ours & {alias.name.split(".")[0] for alias in node.names}


def test_vllms_steps_are_the_drafts_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []

    class LLM:
        def __init__(self, **settings: Any) -> None:
            told.append(settings)
            self.drafts = 100  # of other requests

        def generate(self, prompts: list[dict[str, list[int]]], params: Any, use_tqdm: bool) -> list[Any]:
            assert vars(params) == {"temperature": 0, "max_tokens": 3, "ignore_eos": True, "detokenize": False}
            self.drafts += 2 * len(prompts)
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=p["prompt_token_ids"] * 3)]) for p in prompts]

        def get_metrics(self) -> list[Any]:
            drafts = SimpleNamespace(name="vllm:spec_decode_num_drafts", value=self.drafts)
            return [SimpleNamespace(name="vllm:spec_decode_num_draft_tokens", value=7), drafts]

    fake = ModuleType("vllm")
    vars(fake).update(__version__="9", LLM=LLM, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    settings = {"model": "m", "dtype": "float32", "context_length": 64, "max_batch_size": 4}
    options = {"enforce_eager": True, "max_num_seqs": 5}
    drafting = load_engine(
        str(FOLDER / "vllm_engine.py"), settings | {"draft": {"method": "medusa"}, "options": options}
    )
    plain = load_engine(str(FOLDER / "vllm_engine.py"), settings | {"draft": None, "options": {}})
    assert drafting.version == "vLLM 9"
    assert drafting.answer([[1], [2]], 3) == ([[1, 1, 1], [2, 2, 2]], 4)
    assert plain.answer([[1]], 3) == ([[1, 1, 1]], None)
    assert told[0]["speculative_config"] == {"method": "medusa"} and "speculative_config" not in told[1]
    assert (told[0]["enforce_eager"], told[0]["max_num_seqs"], told[1]["max_num_seqs"]) == (True, 5, 4)
    assert told[0]["enable_prefix_caching"] is told[0]["disable_log_stats"] is False


def test_llama_forgets_each_prompt_and_stops_at_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    class Llama:
        resets = 0

        def __init__(self, **settings: Any) -> None:
            assert settings["model_path"] == "f.gguf" and settings["n_threads"] == settings["n_threads_batch"] == 2

        def reset(self) -> None:
            self.resets += 1

        def generate(self, prompt: list[int], **sampling: Any) -> Iterator[int]:
            assert sampling["temp"] == 0
            for i in range(3):
                yield prompt[0] + i
            raise AssertionError("a token more than was asked for")

    fake = ModuleType("llama_cpp")
    vars(fake).update(__version__="9", Llama=Llama)
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    settings = {"model": "f.gguf", "context_length": 64, "num_threads": 2}
    engine = load_engine(str(FOLDER / "llama_engine.py"), settings)
    assert engine.answer([[1], [5]], 3) == ([[1, 2, 3], [5, 6, 7]], None)
    assert engine._llama.resets == 2


def test_the_engines_asked_for_get_our_weights_and_our_heads(
    tiny_folder: Path, heads_folder: Path, tmp_path: Path
) -> None:
    model = medusa.load(tiny_folder, heads=heads_folder, dtype="float32")
    work = tmp_path / "work"
    room = {"workdir": work, "source": str(tiny_folder), "context_length": 64, "max_batch_size": 4, "num_threads": 2}
    assert peer_launches(Environments(), model, **room) == []  # type: ignore[arg-type]
    both = Environments(vllm=Path("v"), vllm_options={"x": 1}, llama=Path("l"), gguf=Path("f.gguf"))
    launches = {one.name: one for one in peer_launches(both, model, **room)}  # type: ignore[arg-type]
    assert list(launches) == [VLLM, VLLM_HEADS, LLAMA]
    assert [launches[name].max_batch_size for name in launches] == [4, 4, 1]
    draft = launches[VLLM_HEADS].settings["draft"]
    assert draft["num_speculative_tokens"] == 2
    assert json.loads((Path(draft["model"]) / "config.json").read_text())["model_type"] == "medusa"
    assert launches[VLLM].settings["draft"] is None
    assert launches[VLLM_HEADS].settings["context_length"] > 64 + 2, "a whole draft fits behind the last token"
    assert launches[VLLM].settings["dtype"] == "float32" and launches[VLLM].settings["options"] == {"x": 1}
    assert launches[VLLM].environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert all(json.dumps(dict(one.settings)) and one.engine.is_file() for one in launches.values())
    with pytest.raises(ValueError, match="--gguf FILE"):
        peer_launches(Environments(llama=Path("l")), model, **room)  # type: ignore[arg-type]


def test_vllm_gets_heads_of_a_kind_that_it_has(tiny_folder: Path, heads_folder: Path, tmp_path: Path) -> None:
    plain = medusa.load(tiny_folder, heads=heads_folder, dtype="float32")
    hydra = MedusaHeads(
        HeadsConfig(num_heads=3, kind="hydra"),
        hidden_size=plain.backbone.hidden_size,
        vocab_size=plain.backbone.vocab_size,
    )
    saved = save_checkpoint(
        tmp_path / "hydra", hydra, paths=[(0,)], backbone_name=plain.backbone.name,
        backbone_fingerprint=plain.backbone.fingerprint,
    )  # fmt: skip
    model = medusa.load(tiny_folder, heads=saved, dtype="float32")
    room = {"source": str(tiny_folder), "context_length": 64, "max_batch_size": 4, "num_threads": 2}
    vllm = Environments(vllm=Path("v"))
    alone = peer_launches(vllm, model, workdir=tmp_path / "a", **room)  # type: ignore[arg-type]
    assert [one.name for one in alone] == [VLLM]
    beside = peer_launches(vllm, model, workdir=tmp_path / "b", others=[plain], **room)  # type: ignore[arg-type]
    assert [one.name for one in beside] == [VLLM, VLLM_HEADS]
    assert beside[1].settings["draft"]["num_speculative_tokens"] == 2, "those of the other set"
    with pytest.raises(ValueError, match="give --heads plain"):
        bench.main(
            backbone=str(tiny_folder), heads=str(saved), dtype="float32", threads=torch.get_num_threads(), tree=["chain"],
            vllm=Path("v"),
        )  # fmt: skip


def test_options_are_a_json_object() -> None:
    assert parse_options('{"enforce_eager": true}') == {"enforce_eager": True}
    for wrong in ("enforce_eager", "[1]", "3"):
        with pytest.raises(ValueError, match="must be a JSON object"):
            parse_options(wrong)
