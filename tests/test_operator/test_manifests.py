"""Spec → manifests: golden files, and what must hold of every rendering."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from fleetlm_common.kubeapi import Object
from fleetlm_common.kubenames import ring_labels
from fleetlm_operator.ringplan import Apply, Create, images_of, plan
from fleetlm_operator.workloads import GATEWAY_END_S, PRE_STOP_S, RENDERING, RENDERINGS, stateful_set
from tests.support.netpolicy import Peer, may_connect
from tests.test_operator.modelcluster import DEFAULTS, ModelCluster

GOLDEN = Path(__file__).parents[1] / "golden" / "manifests"
FULL: Object = {
    "replicas": 5,
    "slots": 1024,
    "version": "2.3.4",
    "image": {"registry": "mirror.example/fleet", "pullPolicy": "Always", "pullSecrets": ["mirror"]},
    "storage": {"size": "100Gi", "className": "fast"},
    "log": {"fsync": "interval", "fsyncIntervalMilliseconds": 50, "segmentSize": "128Mi"},
    "hot": {"maxBytes": "1Gi"},
    "retention": {"maxBytes": "50Gi", "maxAgeSeconds": 86400},
    "idempotency": {"windowSeconds": 600, "maxKeys": 50000},
    "resources": {"requests": {"cpu": 1, "memory": "2Gi"}, "limits": {"memory": "2Gi"}},
    "scheduling": {
        "nodeSelector": {"disk": "local"},
        "tolerations": [{"key": "chat", "operator": "Exists", "effect": "NoSchedule"}],
        "spread": [{"topologyKey": "topology.kubernetes.io/zone", "maxSkew": 2, "whenUnsatisfiable": "DoNotSchedule"}],
        "priorityClassName": "chat",
    },
    "gateway": {
        "replicas": 4,
        "origins": ["https://app.example", "https://beta.example"],
        "sockets": 5000,
        "drainWindowSeconds": 60,
        "service": {
            "type": "LoadBalancer",
            "annotations": {"lb.example/idle": "3600"},
            "loadBalancerClass": "lb.example/l4",
        },
        "resources": {"requests": {"cpu": "500m"}},
    },
    "drain": {"timeoutSeconds": 30, "terminationGracePeriodSeconds": 120},
    "networkPolicy": {"opsNamespaces": ["monitoring"]},
    "volumeRetention": {"whenDeleted": "Delete", "whenScaled": "Delete"},
    "logLevel": "debug",
}
ARCHIVED: Object = {"archive": {"secretRef": {"name": "postgres", "key": "uri"}}}
SPECS: Final = {"minimal": {}, "full": FULL, "archived": ARCHIVED}


def rendered(spec: Object) -> dict[str, Object]:
    """Every child of a new ring, by kind and name."""
    actions = plan(ModelCluster(spec).observe(), DEFAULTS).actions
    return {action.child.key: action.child.body for action in actions if isinstance(action, Apply | Create)}


@pytest.mark.parametrize(("name", "spec"), SPECS.items())
def test_manifests_are_the_golden_ones(name: str, spec: Object) -> None:
    """A change here is a change of every ring at the operator's upgrade: pods may only change with a new rendering.

    `python -m tests.test_operator.test_manifests` writes the files anew.
    """
    assert rendered(spec) == yaml.safe_load((GOLDEN / f"rendering-{RENDERING}-{name}.yaml").read_text())


@pytest.mark.parametrize("rendering", sorted(RENDERINGS))
@pytest.mark.parametrize(("name", "spec"), SPECS.items())
def test_pods_of_every_rendering_are_the_golden_ones(name: str, spec: Object, rendering: int) -> None:
    """A ring at rest keeps the rendering that it has, for as long as some operator knows it."""
    cluster = ModelCluster(spec)
    images = images_of(cluster.observe(), DEFAULTS)
    made = stateful_set(cluster.ring, images, replicas=1, claim_size="1Gi", rendering=rendering)["spec"]["template"]
    golden = yaml.safe_load((GOLDEN / f"rendering-{rendering}-{name}.yaml").read_text())
    assert made == golden["StatefulSet demo-shard"]["spec"]["template"]


def pods(spec: Object) -> dict[str, Object]:
    """The pod specs of shard and gateway."""
    children = rendered(spec)
    return {
        "shard": children["StatefulSet demo-shard"]["spec"]["template"]["spec"],
        "gateway": children["Deployment demo-gateway"]["spec"]["template"]["spec"],
    }


@pytest.mark.parametrize("component", ["shard", "gateway"])
def test_pods_are_restricted(component: str) -> None:
    """The `restricted` pod security standard, and a root file system that cannot be written."""
    pod = pods({})[component]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)


@pytest.mark.parametrize("spec", [{}, FULL], ids=["minimal", "full"])
def test_grace_periods_fit(spec: Object) -> None:
    """Kubernetes kills nobody who is still within its own time to leave."""
    asked = ModelCluster(spec).ring.spec
    found = pods(spec)
    assert found["shard"]["terminationGracePeriodSeconds"] >= asked.drain.timeout_seconds + 25
    needed = PRE_STOP_S + asked.gateway.drain_window_seconds + GATEWAY_END_S
    assert found["gateway"]["terminationGracePeriodSeconds"] > needed


def variables(component: str, spec: Object) -> dict[str, str]:
    """The variables that a component is told."""
    environment: list[dict[str, Any]] = pods(spec)[component]["containers"][0]["env"]
    return {each["name"]: each["value"] for each in environment if "value" in each}


def test_the_archives_retention_reaches_the_shards() -> None:
    """Only when it is asked for: pods of rings that do not stay as they are."""
    name = "FLEETLM_SHARD_ARCHIVE_RETENTION_S"
    asked = {"archive": {**ARCHIVED["archive"], "maxAgeSeconds": 7_776_000}}
    assert variables("shard", asked)[name] == "7776000"
    assert name not in variables("shard", ARCHIVED)


def test_every_variable_is_one_that_the_component_knows() -> None:
    """An unknown one would keep it from starting."""
    page = (Path(__file__).parents[2] / "docs" / "operations" / "configuration.md").read_text()
    for component in ("shard", "gateway"):
        for name in [*variables(component, FULL), *variables(component, ARCHIVED)]:
            assert f"`{name}`" in page, name


def test_roles_are_the_least() -> None:
    """A shard writes its own announcements and nothing else; a gateway writes nothing; nobody reads Secrets."""
    children = rendered({})
    gateway = {verb for rule in children["Role demo-gateway"]["rules"] for verb in rule["verbs"]}
    assert gateway == {"get", "list", "watch"}
    writing = [rule for rule in children["Role demo-shard"]["rules"] if {"patch", "update"} & set(rule["verbs"])]
    assert [rule["resourceNames"] for rule in writing] == [["demo-shard-0", "demo-shard-1", "demo-shard-2"]]
    asked = {
        kind
        for role in ("shard", "gateway")
        for rule in children[f"Role demo-{role}"]["rules"]
        for kind in rule["resources"]
    }
    assert asked == {"ringmaps", "leases"}


PEERS: Final = {
    "shard": Peer("chat", ring_labels("demo", "shard")),
    "gateway": Peer("chat", ring_labels("demo", "gateway")),
    "neighbour": Peer("chat", {"app": "web"}),
    "gateway of another ring": Peer("chat", ring_labels("other", "gateway")),
    "gateway of a ring of this name elsewhere": Peer("elsewhere", ring_labels("demo", "gateway")),
    "stranger": Peer("elsewhere", {"app": "web"}),
    "operator": Peer(DEFAULTS.namespace, {"app.kubernetes.io/component": "operator"}),
    "monitoring": Peer("monitoring", {"app": "prometheus"}),
}
WATCHERS: Final = {"shard", "gateway", "neighbour", "gateway of another ring", "operator", "monitoring"}


@pytest.mark.parametrize(
    ("target", "port", "callers"),
    [
        ("shard", 4100, {"shard", "gateway"}),
        ("shard", 4101, WATCHERS),
        ("shard", 22, set[str]()),
        ("gateway", 4000, set(PEERS)),
        ("gateway", 4001, WATCHERS),
        ("gateway", 22, set[str]()),
    ],
)
def test_who_reaches_which_port(target: str, port: int, callers: set[str]) -> None:
    """As a network that enforces policies lets them: shards hear their ring, clients come from anywhere."""
    made = rendered({"networkPolicy": {"opsNamespaces": ["monitoring"]}})
    policies = [child for key, child in made.items() if key.startswith("NetworkPolicy")]
    assert len(policies) == 2
    reached = {
        name for name, peer in PEERS.items() if may_connect(policies, source=peer, target=PEERS[target], port=port)
    }
    assert reached == callers


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for file, asked_for in SPECS.items():
        text = yaml.safe_dump(rendered(asked_for), sort_keys=True, width=120)
        (GOLDEN / f"rendering-{RENDERING}-{file}.yaml").write_text(text)
