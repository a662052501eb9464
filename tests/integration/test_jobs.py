"""The life cycle as submitted jobs, through the Jobs API of a real cluster of two nodes, tracked by an MLflow server.

The jobs run the code that is uploaded with them and see nothing of the checkout that the tests run in.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from pipelines import train
from pipelines.capacity import Need, require
from pipelines.cluster import ray_session
from pipelines.config import Config, load_config
from pipelines.errors import ConfigError, StageError
from pipelines.records import TRAIN, read_answers
from pipelines.registry import open_registry
from tests.local_cluster import LocalCluster, answers, free_ports, local_cluster, wait_until
from tests.registered import champion_of

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ROOT = Path(__file__).resolve().parents[2]
STEPS, CHECKPOINT_EVERY = 400, 20
PLANTED = {
    ".git/objects/pack": "history",
    ".venv/lib/torch.so": "an environment",
    "medusa-work/mlflow.db": "runs",
    "model.gguf": "weights",
    "pipelines/__pycache__/run.pyc": "bytecode",
}

pytestmark = pytest.mark.timeout(900)  # a busy machine is slow; none of these waits for a time, all for an event


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    before = os.environ.get("RAY_AUTH_MODE")
    os.environ["RAY_AUTH_MODE"] = "disabled"  # as the nodes have it: the client reads it
    try:
        with local_cluster(num_cpus=2) as made:
            made.add_node("second", num_cpus=2, resources={"second": 2})
            yield made
    finally:
        if before is None:
            del os.environ["RAY_AUTH_MODE"]
        else:
            os.environ["RAY_AUTH_MODE"] = before


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an MLflow server that ends with the module."""
    folder = tmp_path_factory.mktemp("mlflow")
    (port,) = free_ports(1)
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True) as server,
    ):
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), timeout_s=180, what="the MLflow server")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, 9)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as a user has them, beside what must not travel."""
    folder = tmp_path_factory.mktemp("checkout")
    for package in ("medusa", "pipelines"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / file, folder / file)
    for name, text in PLANTED.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def configuration(tiny_folder: Path, tracking: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file of tiny settings over a working directory that both nodes see."""
    folder = tmp_path_factory.mktemp("shared")
    settings = {
        "workdir": str(folder / "work"),
        "backbone": {"name": str(tiny_folder), "dtype": "float32"},
        "ray": {"address": "auto", "placement": "STRICT_SPREAD", "measure_on": {"second": 1}},
        "prompts": {"limit": 8, "calibration_limit": 2},
        "distill": {"heads": "none", "max_tokens": 16, "context_length": 256, "rows_per_file": 5, "num_actors": 2},
        "heads": {"num_heads": 2},
        "train": {
            "init_from": "none", "steps": 6, "warmup_steps": 2, "batch_positions": 32, "num_workers": 2, "shards": 2,
            "zero_stage": 0, "holdout_share": 0.2, "checkpoint_every": CHECKPOINT_EVERY, "log_every": 1, "threads": 1,
            "lr_heads": 0.01,
        },
        "calibrate": {"sizes": [1, 4], "tokens_per_size": 8, "rounds": 1},
        "evaluate": {"num_prompts": 2, "max_tokens": 16, "identity_prompts": 2},
        "promote": {"min_speedup": 0.01},  # a tiny model's tree is slower than its plain decoding
        "registry": {"tracking_uri": tracking},
    }  # fmt: skip
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(scope="module")
def client(cluster: LocalCluster) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(cluster.jobs_address)


@pytest.fixture(scope="module")
def submit(client: JobSubmissionClient, checkout: Path) -> Callable[[str], str]:
    def start(entrypoint: str) -> str:
        return client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(checkout)})

    return start


def ended(client: JobSubmissionClient, job: str, *, timeout_s: float = 300) -> tuple[str, str]:
    """Status and log of a job that has come to its end."""
    try:
        wait_until(lambda: client.get_job_status(job).is_terminal(), timeout_s=timeout_s, what=f"the end of {job}")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{client.get_job_logs(job)}") from None
    return client.get_job_status(job).value, client.get_job_logs(job)


def test_the_upload_carries_the_sources_and_nothing_else(
    client: JobSubmissionClient, submit: Callable[[str], str], checkout: Path
) -> None:
    here = 'python -c "import pipelines, sys; print(sys.executable, pipelines.__file__)"'
    status, log = ended(client, submit(f"find . -type f | sort; {here}"))
    assert status == "SUCCEEDED", log
    sent = {line.removeprefix("./") for line in log.splitlines() if line.startswith("./")}
    have = {str(file.relative_to(checkout)) for file in checkout.rglob("*") if file.is_file()}
    assert sent == have - PLANTED.keys()
    assert re.search(rf"^{re.escape(sys.executable)} .*/_ray_pkg_\w+/pipelines/__init__.py$", log, re.MULTILINE)


@pytest.fixture(scope="module")
def life(client: JobSubmissionClient, submit: Callable[[str], str], configuration: Path) -> str:
    """Log of the job that went all the way, before a gate that let nothing pass."""
    status, log = ended(
        client, submit(f"python -m pipelines.run --config {configuration} promote.min_acceleration=100")
    )
    assert status == "SUCCEEDED", log
    return log


def test_the_whole_life_cycle_is_one_job_and_a_part_of_it_another(
    client: JobSubmissionClient, submit: Callable[[str], str], configuration: Path, life: str
) -> None:
    """The gate refuses at first: told, and no failure. What comes after goes on from what is there."""
    log = life
    told = re.findall(r"^(distill|train|calibrate|evaluate|register|promote): ", log, re.MULTILINE)
    assert told == ["distill", "train", "calibrate", "evaluate", "register", "promote"], log
    assert "is not promoted: acceleration rate" in log
    assert "on a node with second 1" in log
    config = load_config(configuration)
    assert champion_of(config) is None

    status, log = ended(client, submit(f"python -m pipelines.run --config {configuration} run.first=promote"))
    assert status == "SUCCEEDED", log
    champion = champion_of(config)
    assert champion is not None
    assert (champion.number, champion.folder is not None) == (1, True)


def test_a_stage_that_fails_fails_the_job_and_is_named(
    client: JobSubmissionClient, submit: Callable[[str], str], configuration: Path, tmp_path: Path
) -> None:
    job = submit(f"python -m pipelines.run --config {configuration} run.first=evaluate workdir={tmp_path / 'empty'}")
    status, log = ended(client, job)
    assert status == "FAILED"
    assert client.get_job_info(job).driver_exit_code == 2
    assert f"error: evaluate failed: no checkpoint at {tmp_path / 'empty' / 'checkpoint'}; run `train` first" in log
    assert "Traceback" not in log


@pytest.mark.usefixtures("life")
def test_training_survives_a_stop_and_the_loss_of_a_node(
    client: JobSubmissionClient, submit: Callable[[str], str], configuration: Path, cluster: LocalCluster
) -> None:
    """Stopped and submitted again, then bereft of a node, it ends with the loss curve of a run that nothing befell."""
    elastic = f"train.steps={STEPS} ray.min_workers=1 ray.placement=SPREAD ray.resize_every_s=600"
    command = f"python -m pipelines.train --config {configuration} {elastic}"
    config = load_config(configuration, elastic.split())
    name = train.run_name(config, read_answers(config.layout.distilled, TRAIN))
    kept = config.layout.training / name / "checkpoint_manager_snapshot.json"
    registry = open_registry(config)

    def told() -> list[tuple[int, float]]:
        return registry.history(registry.run_for(name, {}), "loss") if kept.exists() else []

    first = submit(command)
    wait_until(lambda: bool(told()), timeout_s=240, what="the first checkpoint, and losses that were sent")
    client.stop_job(first)
    assert ended(client, first)[0] == "STOPPED"
    assert not train._finished(config, name), "too fast to be stopped: raise STEPS"
    reached = max(step for step, _ in told())

    second = submit(command)
    wait_until(lambda: told()[-1][0] > reached + CHECKPOINT_EVERY, timeout_s=240, what="steps after the stop")
    cluster.kill("second")
    status, log = ended(client, second)
    assert status == "SUCCEEDED", log

    curve: dict[int, list[float]] = {}
    for step, loss in told():
        curve.setdefault(step, []).append(loss)
    assert sorted(curve) == list(range(1, STEPS + 1))
    again = {step: losses for step, losses in curve.items() if len(losses) > 1}
    assert again, "no step was done twice: neither the stop nor the loss of the node came in between"
    assert min(again) > CHECKPOINT_EVERY  # what came before the first checkpoint was done once
    for losses in again.values():
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-3)
    cluster.add_node("second-again", num_cpus=2, resources={"second": 2})


# What a cluster is asked before work begins. The driver is here, in a folder of the head's.


@pytest.fixture
def on_cluster(cluster: LocalCluster, configuration: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    monkeypatch.chdir(cluster.cwd("head"))

    def make(*overrides: str) -> Config:
        return load_config(configuration, [f"ray.address={cluster.address}", *overrides])

    return make


def test_what_the_nodes_do_not_share_is_refused(on_cluster: Callable[..., Config], tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"registry.tracking_uri is SQLite, which 2 nodes cannot share"),
        ray_session(on_cluster("registry.tracking_uri=null")),
    ):
        pass
    with (
        pytest.raises(ConfigError, match=r"workdir /proc/self/cwd/work is not shared: node \S+ \(\w{8}\) does not"),
        ray_session(on_cluster("workdir=/proc/self/cwd/work")),
    ):
        pass
    assert list((Path.cwd() / "work").iterdir()) == []
    with ray_session(on_cluster(f"workdir={tmp_path}")):
        assert list(tmp_path.iterdir()) == []


def test_what_the_cluster_cannot_give_is_refused_at_once(on_cluster: Callable[..., Config]) -> None:
    config = on_cluster()
    with ray_session(config):
        workers = Need(what="training workers", count=5, each={"CPU": 1}, lower="train.num_workers")
        with pytest.raises(
            StageError, match=r"need 5 × CPU 1; Ray has room for 4; lower train.num_workers, or add nodes"
        ):
            require(config, workers)
        wide = Need(what="training workers", count=1, each={"CPU": 3}, lower="train.cpus_per_worker")
        with pytest.raises(StageError, match=r"need 1 × CPU 3; Ray has room for 0"):
            require(config, wide)
        gpu = Need(what="training workers", count=1, each={"CPU": 1, "GPU": 1}, lower="train.num_workers")
        with pytest.raises(StageError, match=r"room for 0; it has no GPU"):
            require(config, gpu)
        require(config, Need(what="training workers", count=4, each={"CPU": 1}, lower="train.num_workers"))


def test_nodes_that_come_are_waited_for(
    on_cluster: Callable[..., Config], cluster: LocalCluster, caplog: pytest.LogCaptureFixture
) -> None:
    config = on_cluster("ray.wait_s=90")
    need = Need(what="training workers", count=2, each={"third": 1}, lower="train.num_workers")
    with ray_session(config), caplog.at_level("INFO", logger="pipelines.capacity"):
        coming = threading.Timer(1, lambda: cluster.add_node("third", num_cpus=1, resources={"third": 2}))
        coming.start()
        require(config, need)
        coming.join()
    assert "training workers need 2 × third 1, there is room for 0: waiting for nodes" in caplog.text
    cluster.kill("third")


@pytest.mark.parametrize(
    ("address", "told"),
    [("127.0.0.1:{free}", r"\(nothing listens at \S+:{free}\); start one"), ("nonsense", r"\(Invalid address format")],
)
def test_a_cluster_that_is_not_there_is_one_line_at_once(configuration: Path, address: str, told: str) -> None:
    (free,) = free_ports(1)
    config = load_config(configuration, [f"ray.address={address.format(free=free)}"])
    began = time.monotonic()
    with pytest.raises(StageError, match=told.format(free=free)) as caught, ray_session(config):
        pass
    assert str(caught.value).startswith(f"no Ray cluster at ray.address={config.ray.address} (")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 30
