"""Who reaches what, computed from the NetworkPolicies as Kubernetes defines them: what executes code stays inside."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from tests.unit.deploy.kubernetes.rendered import OVERLAYS, Manifest, of_kind

OURS = "medusa"
CODE_PORTS = {"GCS": 6379, "dashboard and Jobs API": 8265, "Ray client": 10001, "agent": 52365, "worker": 10002}
SERVE, METRICS, MLFLOW = 8000, 8080, 5000


@dataclass(frozen=True)
class Pod:
    labels: dict[str, str]
    namespace: str = OURS
    namespace_labels: dict[str, str] = field(default_factory=dict)


RAY = Pod({"ray.io/is-ray-node": "yes", "ray.io/node-type": "head"})
REGISTRY = Pod({"app": "mlflow"})
SUBMITTER = Pod({"medusa/role": "submitter"})
NEIGHBOUR = Pod({"app": "notebook"})
OPERATOR = Pod({"app.kubernetes.io/name": "kuberay-operator"}, namespace="kuberay-system")
STRANGER = Pod({"ray.io/is-ray-node": "yes", "medusa/role": "submitter", "app": "mlflow"}, namespace="elsewhere")
GATEWAY = Pod({}, namespace="ingress", namespace_labels={"medusa/clients": "yes"})
PROMETHEUS = Pod({}, namespace="monitoring", namespace_labels={"medusa/monitoring": "yes"})


def matches(selector: Manifest | None, labels: dict[str, str]) -> bool:
    assert selector is None or selector.keys() <= {"matchLabels"}, "this model knows matchLabels alone"
    return all(labels.get(key) == value for key, value in (selector or {}).get("matchLabels", {}).items())


def lets_in(peer: Manifest, source: Pod) -> bool:
    """One entry of `from`: without a namespaceSelector it means the policy's own namespace."""
    assert peer.keys() <= {"podSelector", "namespaceSelector"}
    inside = (
        matches(peer["namespaceSelector"], source.namespace_labels)
        if "namespaceSelector" in peer
        else source.namespace == OURS
    )
    return inside and matches(peer.get("podSelector"), source.labels)


def reaches(policies: list[Manifest], source: Pod, target: Pod, port: int) -> bool:
    """Whether ingress into `target` is open: by no policy that selects it, or by a rule of one that does."""
    selecting = [
        policy["spec"]
        for policy in policies
        if "Ingress" in policy["spec"]["policyTypes"] and matches(policy["spec"]["podSelector"], target.labels)
    ]
    rules = [rule for spec in selecting for rule in spec.get("ingress", ())]
    return not selecting or any(
        ("from" not in rule or any(lets_in(peer, source) for peer in rule["from"]))
        and ("ports" not in rule or any(entry["port"] == port for entry in rule["ports"]))
        for rule in rules
    )


@pytest.fixture(params=OVERLAYS)
def policies(request: pytest.FixtureRequest) -> list[Manifest]:
    return of_kind(request.param, "NetworkPolicy")


@pytest.mark.parametrize("port", CODE_PORTS.values(), ids=CODE_PORTS.keys())
def test_what_executes_code_is_closed(policies: list[Manifest], port: int) -> None:
    for source in (STRANGER, GATEWAY, PROMETHEUS, NEIGHBOUR, REGISTRY):
        assert not reaches(policies, source, RAY, port), f"{source} reaches {port}"
    assert reaches(policies, RAY, RAY, port), "Ray's nodes need each other"
    assert reaches(policies, SUBMITTER, RAY, port) == (port == 8265)
    assert reaches(policies, OPERATOR, RAY, port) == (port in (8265, 52365))


def test_clients_metrics_and_registry_have_one_door_each(policies: list[Manifest]) -> None:
    asked = {"gateway": GATEWAY, "prometheus": PROMETHEUS, "stranger": STRANGER, "neighbour": NEIGHBOUR, "ray": RAY}

    def who(target: Pod, port: int) -> set[str]:
        return {name for name, source in asked.items() if reaches(policies, source, target, port)}

    assert who(RAY, SERVE) == {"gateway", "neighbour", "ray"}
    assert who(RAY, METRICS) == {"prometheus", "ray"}
    assert who(REGISTRY, MLFLOW) == {"ray"}
    assert who(NEIGHBOUR, 80) == set(), "what nobody named is closed"


def test_egress_is_named_too(policies: list[Manifest]) -> None:
    rules = [rule for one in policies for rule in one["spec"].get("egress", ())]
    to_anyone = [{entry["port"] for entry in rule["ports"]} for rule in rules if "to" not in rule]
    assert set().union(*to_anyone) == {53, 443, 6443}
    assert any(one["spec"]["podSelector"] == {} and "Egress" in one["spec"]["policyTypes"] for one in policies)
