"""The manifests as `kubectl kustomize` renders them. Knows files and kubectl; talks to no cluster."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[4]
FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("base", "overlays/laptop-kind", "overlays/gpu")
STAGES = ("distill", "train", "calibrate", "evaluate", "register", "promote", "run")
JOBS = tuple(f"jobs/{stage}" for stage in STAGES)

Manifest = dict[str, Any]


@functools.cache
def render(name: str) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on this machine")
    outcome = subprocess.run(["kubectl", "kustomize", str(FOLDER / name)], capture_output=True, text=True, timeout=60)
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


@functools.cache
def manifests(name: str) -> list[Manifest]:
    """To be read only: every test sees the same."""
    return list(yaml.load_all(render(name), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def of_kind(name: str, kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests(name) if manifest["kind"] == kind]


def the(name: str, kind: str) -> Manifest:
    (manifest,) = of_kind(name, kind)
    return manifest


def pods(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Every pod that a manifest asks for, by a name for messages; Ray's own sidecars are not among them."""
    match manifest["kind"]:
        case "Deployment":
            yield "deployment", manifest["spec"]["template"]
        case "RayJob":
            yield "submitter", manifest["spec"]["submitterPodTemplate"]
        case "RayCluster" | "RayService":
            cluster = ray_cluster(manifest)
            yield "head", cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                yield group["groupName"], group["template"]


def ray_cluster(manifest: Manifest) -> Manifest:
    """The RayClusterSpec of a RayCluster or RayService."""
    spec = manifest["spec"]
    return spec["rayClusterConfig"] if manifest["kind"] == "RayService" else spec


def serve_config(name: str) -> Manifest:
    return yaml.safe_load(the(name, "RayService")["spec"]["serveConfigV2"])


def pipeline_settings(name: str) -> str:
    (settings,) = (one for one in of_kind(name, "ConfigMap") if one["metadata"]["name"] == "medusa-pipelines")
    return settings["data"]["pipelines.yaml"]
