"""What every manifest must hold: the operator's schema, hardened pods, volumes and secrets that exist, probes, grace."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.unit.deploy.kubernetes.rendered import (
    JOBS,
    OVERLAYS,
    ROOT,
    Manifest,
    manifests,
    of_kind,
    pods,
    ray_cluster,
    render,
    serve_config,
    the,
)

ALL = OVERLAYS + JOBS
OPERATORS_SCHEMA = ROOT.parent / "shared" / "tools" / "validate-kuberay.py"


@pytest.mark.parametrize("name", ALL)
def test_every_object_is_named_once_and_in_the_namespace(name: str) -> None:
    found = [(one["apiVersion"], one["kind"], one["metadata"]["name"]) for one in manifests(name)]
    assert len(found) == len(set(found)) > 0
    spaces = {one["metadata"].get("namespace") for one in manifests(name) if one["kind"] != "Namespace"}
    assert spaces == {"medusa"}
    assert all(version == "ray.io/v1" for version, kind, _ in found if kind.startswith("Ray"))


@pytest.mark.slow
@pytest.mark.skipif(not OPERATORS_SCHEMA.is_file(), reason="the operator's schema is not beside this checkout")
def test_the_operators_own_schema() -> None:
    """All at once: reading the schema takes the time."""
    text = "\n---\n".join(map(render, ALL))
    command = [sys.executable, str(OPERATORS_SCHEMA), "-"]
    outcome = subprocess.run(command, input=text, capture_output=True, text=True, timeout=240)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert outcome.stdout.startswith(f"{2 * len(OVERLAYS) + len(JOBS)} manifests checked")


@pytest.mark.parametrize("name", ALL)
def test_pods_pass_the_restricted_pod_security_standard(name: str) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards, as the namespace enforces it."""
    for manifest in manifests(name):
        for group, template in pods(manifest):
            where, spec = f"{manifest['kind']}/{group}", template["spec"]
            assert spec["securityContext"]["runAsNonRoot"] is True, where
            assert spec["securityContext"]["runAsUser"] > 0, where
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
            assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), where
            assert all(_restricted(one) for one in spec["containers"]), where
        if manifest["kind"] in ("RayCluster", "RayService"):
            assert _restricted(ray_cluster(manifest)["autoscalerOptions"]), "the autoscaler's sidecar"


def _restricted(container: Manifest) -> bool:
    context = container["securityContext"]
    return context["allowPrivilegeEscalation"] is False and context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("name", ALL)
def test_every_container_says_what_it_needs_and_comes_from_a_tagged_image(name: str) -> None:
    for manifest in manifests(name):
        for group, template in pods(manifest):
            for container in template["spec"]["containers"]:
                assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), group
                assert "memory" in container["resources"]["limits"], group
                assert name == "base" or ":" in container["image"], f"{group}: {container['image']}"


@pytest.mark.parametrize("name", OVERLAYS)
def test_volumes_claims_and_settings_exist(name: str) -> None:
    """Secrets are made by hand, from what README says; all else that a pod mounts is in the manifests."""
    there = {(one["kind"], one["metadata"]["name"]) for one in manifests(name)}
    readme = (ROOT / "deploy" / "kubernetes" / "README.md").read_text()
    for manifest in manifests(name):
        for group, template in pods(manifest):
            spec = template["spec"]
            volumes = {volume["name"]: volume for volume in spec["volumes"]}
            for container in spec["containers"]:
                mounted = {mount["name"] for mount in container["volumeMounts"]}
                assert mounted == volumes.keys(), f"{group}: mounted and declared volumes differ"
                for source in container.get("envFrom", ()):
                    assert f"secret generic {source['secretRef']['name']}" in readme
            for volume in volumes.values():
                if claim := volume.get("persistentVolumeClaim"):
                    assert ("PersistentVolumeClaim", claim["claimName"]) in there
                if settings := volume.get("configMap"):
                    assert ("ConfigMap", settings["name"]) in there
                if secret := volume.get("secret"):
                    assert f"secret generic {secret['secretName']}" in readme


@pytest.mark.parametrize("name", OVERLAYS)
def test_grace_covers_what_serve_takes_to_finish(name: str) -> None:
    config = serve_config(name)
    service = the(name, "RayService")
    (workers,) = ray_cluster(service)["workerGroupSpecs"]
    shutdown_s = max(one["graceful_shutdown_timeout_s"] for one in config["applications"][0]["deployments"])
    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] > shutdown_s
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > config["http_options"]["request_timeout_s"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_probes_are_the_operators_for_ray_and_ours_for_the_rest(name: str) -> None:
    """A probe on a Ray container would replace the operator's, which also asks Serve's proxy."""
    for manifest in manifests(name):
        for group, template in pods(manifest):
            for container in template["spec"]["containers"]:
                probes = {key for key in container if key.endswith("Probe")}
                ours = (
                    {"startupProbe", "readinessProbe", "livenessProbe"} if manifest["kind"] == "Deployment" else set()
                )
                assert probes == ours, f"{manifest['kind']}/{group}"


@pytest.mark.parametrize("name", OVERLAYS)
def test_ray_is_the_version_that_the_image_installs_and_asks_for_a_token(name: str) -> None:
    pins = (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
    for kind in ("RayCluster", "RayService"):
        cluster = ray_cluster(the(name, kind))
        assert f"ray=={cluster['rayVersion']}" in pins
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["enableInTreeAutoscaling"] is True


def test_what_submits_a_job_is_the_image_of_the_gpu_overlay() -> None:
    """Which is changed in one place: another would not be pulled."""
    used = {
        container["image"]
        for name in ("overlays/gpu", *JOBS)
        for manifest in manifests(name)
        for _, template in pods(manifest)
        for container in template["spec"]["containers"]
        if "medusa-ray" in container["image"]
    }
    assert len(used) == 1, used


def test_gpu_workers_have_gpus_and_heads_have_none() -> None:
    for kind in ("RayCluster", "RayService"):
        for group, template in pods(the("overlays/gpu", kind)):
            (container,) = template["spec"]["containers"]
            wanted = container["resources"]["limits"].get("nvidia.com/gpu")
            assert wanted == (None if group == "head" else "1")
    for kind in ("RayCluster", "RayService"):
        for _, template in pods(the("overlays/laptop-kind", kind)):
            assert "nvidia.com/gpu" not in template["spec"]["containers"][0]["resources"]["limits"]


def test_metrics_are_scraped_from_a_port_that_ray_nodes_have() -> None:
    monitor = the("overlays/gpu", "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for kind in ("RayCluster", "RayService"):
        for group, template in pods(the("overlays/gpu", kind)):
            ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
            assert ports[endpoint["port"]] == 8080, group
    assert not of_kind("overlays/laptop-kind", "PodMonitor"), "kind has no Prometheus operator"


def test_every_kustomization_can_be_rendered() -> None:
    folder = ROOT / "deploy" / "kubernetes"
    found = {str(file.parent.relative_to(folder)) for file in folder.rglob("kustomization.yaml")}
    assert found == {*ALL, "jobs/stage", "components/image", "components/monitoring"}
