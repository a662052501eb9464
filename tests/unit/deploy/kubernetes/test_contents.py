"""What the manifests carry of ours: Serve's configuration, the jobs' entrypoints and settings, the image's sources."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deploy import serve
from pipelines.config import Config, load_config
from tests.unit.deploy.kubernetes.rendered import (
    JOBS,
    OVERLAYS,
    ROOT,
    STAGES,
    Manifest,
    pipeline_settings,
    ray_cluster,
    serve_config,
    the,
)

CLUSTERS = {"base": "base", "overlays/laptop-kind": "base", "overlays/gpu": "overlays/gpu"}
MISSING = "(not there)"
# Where a pod's configuration may differ from deploy/serve.yaml, which is for a machine.
OF_A_CLUSTER = {
    "http_options.host", "applications.0.args.workdir", "applications.0.args.registry",
    "applications.0.args.serve.api_keys_file",
}  # fmt: skip
OF_ITS_MACHINES = {
    "applications.0.args.serve.max_batch_size", "applications.0.args.serve.context_length",
    "applications.0.deployments.0.autoscaling_config.max_replicas",
    "applications.0.deployments.0.ray_actor_options.num_cpus", "applications.0.deployments.0.ray_actor_options.num_gpus",
}  # fmt: skip


def differences(one: Any, other: Any, path: str = "") -> set[str]:
    """Paths at which two trees differ; what one lacks is named by its highest missing node."""
    if isinstance(one, list) and isinstance(other, list):
        one, other = (dict(enumerate(each)) for each in (one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        keys = one.keys() | other.keys()
        each = (differences(one.get(key, MISSING), other.get(key, MISSING), f"{path}.{key}") for key in keys)
        return set().union(*each)
    return set() if one == other else {path.removeprefix(".")}


@pytest.mark.parametrize("name", OVERLAYS)
def test_serves_configuration_is_the_shipped_one_but_for_its_place(name: str) -> None:
    shipped = yaml.safe_load(Path(serve.__file__).with_name("serve.yaml").read_text())
    assert differences(serve_config(name), shipped) - OF_ITS_MACHINES == OF_A_CLUSTER


def test_differences_are_found() -> None:
    assert differences({"a": [1, {"b": 2}], "c": 3}, {"a": [1, {"b": 4}], "d": 3}) == {"a.1.b", "c", "d"}
    assert differences({"a": [1]}, {"a": [1]}) == set()


@pytest.mark.parametrize("name", OVERLAYS)
def test_serves_configuration_parses_with_rays_schema_and_ours(name: str) -> None:
    schema = ServeDeploySchema.model_validate(serve_config(name))
    (application,) = schema.applications
    module, _, attribute = application.import_path.partition(":")
    assert getattr(importlib.import_module(module), attribute) is serve.build
    config = Config.model_validate(application.args)
    assert config.registry.tracking_uri == load_config(_file(name)).registry.tracking_uri, (
        "the champion of the pipelines"
    )
    assert config.workdir == load_config(_file(name)).workdir


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_serving_pod_has_the_keys_and_the_folder_that_its_configuration_names(name: str) -> None:
    config = Config.model_validate(serve_config(name)["applications"][0]["args"])
    (workers,) = ray_cluster(the(name, "RayService"))["workerGroupSpecs"]
    spec = workers["template"]["spec"]
    mounts = {one["mountPath"]: one["name"] for one in spec["containers"][0]["volumeMounts"]}
    assert config.serve.api_keys_file is not None, "who is reached from outside asks for a key"
    keys = mounts[str(config.serve.api_keys_file.parent)]
    (secret,) = (one["secret"]["secretName"] for one in spec["volumes"] if one["name"] == keys)
    readme = (ROOT / "deploy" / "kubernetes" / "README.md").read_text()
    assert f"{secret} --from-file={config.serve.api_keys_file.name}=" in readme
    assert str(config.workdir) in mounts


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_replica_fits_a_pod_and_a_pod_holds_one(name: str) -> None:
    (deployment,) = serve_config(name)["applications"][0]["deployments"]
    (workers,) = ray_cluster(the(name, "RayService"))["workerGroupSpecs"]
    has = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    wants = deployment["ray_actor_options"]
    assert wants["num_cpus"] == int(has["cpu"])
    assert wants.get("num_gpus", 0) == int(has.get("nvidia.com/gpu", 0))
    assert deployment["autoscaling_config"]["max_replicas"] >= workers["maxReplicas"] >= workers["minReplicas"] >= 1


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_pipelines_fit_their_workers(name: str) -> None:
    config = load_config(_file(name))
    (workers,) = ray_cluster(the(name, "RayCluster"))["workerGroupSpecs"]
    has = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    cpus, gpus = int(has["cpu"]), int(has.get("nvidia.com/gpu", 0))
    measure = config.ray.measure_on
    assert measure is not None, "the driver sits on the head, which has no cores for Ray"
    for wanted in (
        (config.distill.cpus_per_actor, config.distill.gpus_per_actor),
        (config.train.cpus_per_worker, float(config.train.use_gpu)),
        (measure.get("CPU", 1), measure.get("GPU", 0)),
    ):
        assert wanted[0] <= cpus
        assert wanted[1] <= gpus
    at_most = workers["maxReplicas"]
    assert config.train.num_workers <= at_most * min(cpus // config.train.cpus_per_worker, gpus or cpus)
    assert config.ray.wait_s >= 300, "an autoscaler takes minutes to bring a machine"


def test_the_gpu_overlays_settings_are_the_shipped_ones() -> None:
    assert load_config(_file("overlays/gpu")) == load_config(Path("cluster"))


@pytest.mark.parametrize(("name", "said"), list(zip(JOBS, STAGES, strict=True)))
def test_an_entrypoint_is_a_stage_with_settings_that_load(name: str, said: str, tmp_path: Path) -> None:
    job = the(name, "RayJob")
    python, dash_m, module, flag, path = shlex.split(job["spec"]["entrypoint"])
    assert (python, dash_m, module, flag) == ("python", "-m", f"pipelines.{said}", "--config")
    assert callable(importlib.import_module(module).run)
    for overlay in OVERLAYS:
        cluster = the(overlay, "RayCluster")
        assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
        spec = ray_cluster(cluster)["headGroupSpec"]["template"]["spec"]  # where the driver runs
        (volume,) = (one["name"] for one in spec["volumes"] if one.get("configMap"))
        (mount,) = (one["mountPath"] for one in spec["containers"][0]["volumeMounts"] if one["name"] == volume)
        assert path == f"{mount}/pipelines.yaml"
        file = tmp_path / "pipelines.yaml"
        file.write_text(pipeline_settings(overlay))
        config = load_config(file)
        assert config.ray.address == "auto"
        assert any(one["mountPath"] == str(config.workdir) for one in spec["containers"][0]["volumeMounts"])


@pytest.mark.parametrize("name", JOBS)
def test_a_job_asks_nothing_that_the_operator_refuses_of_a_standing_cluster(name: str) -> None:
    """KubeRay's validation: with a clusterSelector no backoffLimit, suspend, rayClusterSpec or ttl."""
    refused = {"backoffLimit", "suspend", "rayClusterSpec", "ttlSecondsAfterFinished", "shutdownAfterJobFinishes"}
    assert not refused & the(name, "RayJob")["spec"].keys()


def test_the_registrys_name_is_one_that_it_answers_to() -> None:
    """MLflow refuses a Host that it was not told of, and so would every stage and replica be refused."""
    server, service = the("base", "Deployment"), the("base", "Service")
    address = f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert load_config(_file("base")).registry.tracking_uri == address
    (allowed,) = (one for one in _args(server) if one.startswith("--allowed-hosts="))
    assert address.removeprefix("http://") in allowed.partition("=")[2].split(",")


def test_the_image_is_built_from_sources_that_are_there_and_sent() -> None:
    text = (ROOT / "Dockerfile").read_text()
    sent = {line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = [line.split()[1:-1] for line in text.splitlines() if re.match(r"COPY (?!--)", line)]
    sources = {source for copy in copies for source in copy}
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in sent, f"{source} is not sent to the builder"
    assert {source.split("/")[0] for source in sources} == sent, "what is sent is used"
    assert text.index("USER 1000") < text.index("CMD")


def test_the_image_pins_what_the_project_asks_for() -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "deploy" / "constraints.txt").read_text().splitlines() if "==" in line
    )
    project = (ROOT / "pyproject.toml").read_text()
    asked = re.findall(
        r'^    "([a-z0-9-]+)(?:\[[a-z,]+\])?>=', project.split("[project.optional-dependencies]")[0], re.M
    )
    assert len(asked) > 10
    assert set(asked) <= pins.keys(), f"pin {set(asked) - pins.keys()}"
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins.values()), (
        "exact, of no one machine's build"
    )


def _args(deployment: Manifest) -> list[str]:
    return deployment["spec"]["template"]["spec"]["containers"][0]["args"]


def _file(name: str) -> Path:
    return ROOT / "deploy" / "kubernetes" / CLUSTERS[name] / "pipelines.yaml"
