"""What Helm 3 and Helm 4 make of the chart: golden files, refusals, the test hook's own program."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
import yaml
from prometheus_client import CollectorRegistry

from fleetlm_common.kubeapi import Object
from fleetlm_common.ops import Health, OpsServer
from tests.support.helm import CHART, HELMS, HelmError, helm, rendered

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(1200)]  # Helm may have to be built first

GOLDEN: Final = Path(__file__).parents[1] / "golden" / "chart"
FULL: Final[Object] = {
    "nameOverride": "messages",
    "image": {"registry": "registry.example/fleetlm", "tag": "1.2.3", "pullPolicy": "Always", "pullSecrets": ["pull"]},
    "operator": {
        "replicas": 2,
        "logLevel": "debug",
        "defaultVersion": "1.2.0",
        "resources": {"requests": {"cpu": "1"}},
        "nodeSelector": {"pool": "system"},
        "tolerations": [{"key": "system", "operator": "Exists"}],
        "priorityClassName": "important",
        "podAnnotations": {"seen": "yes"},
        "podLabels": {"team": "chat"},
    },
    "serviceAccount": {"name": "messages", "annotations": {"cloud.example/role": "none"}},
    "metrics": {
        "serviceMonitor": {"enabled": True, "interval": "15s", "labels": {"release": "prometheus"}},
        "podMonitor": {"enabled": True},
    },
    "ring": {"create": True, "name": "chat", "spec": {"replicas": 5}},
}
VALUES: Final[dict[str, Object]] = {
    "default": {},
    "namespaced": {"watch": {"namespaces": ["one", "two"]}, "metrics": {"podMonitor": {"enabled": True}}},
    "full": FULL,
}
RING_KIND: Final = ("--api-versions", "fleetlm.io/v1alpha1/ShardRing")


def made(program: str, name: str, folder: Path) -> list[Object]:
    """The chart rendered with values of that name."""
    values = folder / f"{name}.yaml"
    values.write_text(yaml.safe_dump(VALUES[name]))
    found = rendered(program, "--values", str(values), *RING_KIND)
    return sorted(
        found, key=lambda each: (each["kind"], each["metadata"].get("namespace", ""), each["metadata"]["name"])
    )


@pytest.mark.parametrize("program", HELMS)
@pytest.mark.parametrize("name", VALUES)
def test_templates_are_the_golden_ones(program: str, name: str, tmp_path: Path) -> None:
    """The same from both; a change here is a change of every installation.

    `python -m tests.test_charts.test_templates` writes them anew.
    """
    assert made(program, name, tmp_path) == list(yaml.safe_load_all((GOLDEN / f"{name}.yaml").read_text()))


@pytest.mark.parametrize("namespaces", [(), ("--set", "watch.namespaces={one}")], ids=["clusterwide", "namespaced"])
@pytest.mark.parametrize("asked", [False, True])
def test_nodes_are_listed_clusterwide_or_when_it_is_asked_for(namespaces: tuple[str, ...], *, asked: bool) -> None:
    """One role for it alone, bound to the operator's account; a namespaced release has nothing of the cluster else."""
    found = rendered("helm", *namespaces, "--set", f"watch.nodes={str(asked).lower()}")
    name = "system-fleetlm-operator-nodes"
    role = [each for each in found if each["kind"] == "ClusterRole" and each["metadata"]["name"] == name]
    bound = [each for each in found if each["kind"] == "ClusterRoleBinding" and each["metadata"]["name"] == name]
    if namespaces:
        cluster = [each for each in found if each["kind"].startswith("Cluster")]
        assert len(cluster) == len(role) + len(bound)
    if namespaces and not asked:
        assert not role + bound
        return
    assert [each["rules"] for each in role] == [[{"apiGroups": [""], "resources": ["nodes"], "verbs": ["list"]}]]
    assert [each["roleRef"]["name"] for each in bound] == [name]
    account = {"kind": "ServiceAccount", "name": "fleetlm-operator", "namespace": "system"}
    assert [each["subjects"] for each in bound] == [[account]]


@pytest.mark.parametrize("program", HELMS)
def test_lint_has_nothing_to_say(program: str) -> None:
    """Strictly: warnings count."""
    assert "0 chart(s) failed" in helm(program, "lint", "--strict", str(CHART))


REFUSED: Final = (
    ("operator.replica=2", "replica"),
    ("operators.replicas=2", "operators"),
    ("operator.replicas=0", "replicas"),
    ("operator.replicas=two", "replicas"),
    ("operator.logLevel=loud", "logLevel"),
    ("image.pullPolicy=Sometimes", "pullPolicy"),
    ("image.registry=", "registry"),
    ("watch.namespaces={Team_A}", "namespaces"),
    ("watch.nodes=maybe", "nodes"),
    ("ring.name=9lives", "name"),
    ("metrics.podMonitor.enabled=maybe", "enabled"),
    ("serviceAccount.create=false", "serviceAccount.name is needed when serviceAccount.create is false"),
)


@pytest.mark.parametrize("program", HELMS)
@pytest.mark.parametrize(("wrong", "words"), REFUSED)
def test_a_wrong_value_is_refused_by_name(program: str, wrong: str, words: str) -> None:
    """Before anything is sent to a cluster, naming the value."""
    with pytest.raises(HelmError, match=words):
        rendered(program, "--set", wrong)


@pytest.mark.parametrize("ok", [True, False])
async def test_the_test_hook_asks_the_operator(tmp_path: Path, *, ok: bool) -> None:
    """Its program, run as it is in the pod but with this Python: succeeds when the operator says that it is ready."""
    hook = next(each for each in made("helm", "default", tmp_path) if each["kind"] == "Pod")
    (container,) = hook["spec"]["containers"]
    program, url = container["args"]
    assert container["command"] == ["/app/bin/python", "-c"]
    assert url.endswith(".svc:4200/health/ready")
    port = OpsServer(registry=CollectorRegistry(), ready=lambda: Health(ok=ok, reason="Leading"))
    number = await port.start("127.0.0.1", 0)
    try:
        here = f"http://127.0.0.1:{number}/health/ready"
        quick = program.replace("range(30)", "range(2)")
        command = [sys.executable, "-c", quick, here]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
    finally:
        await port.stop()
    assert done.returncode == (0 if ok else 1), done.stderr
    assert ("Leading" in done.stdout) == ok


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for golden in VALUES:
        text = yaml.safe_dump_all(made("helm", golden, Path("/tmp")), sort_keys=True, width=120)
        (GOLDEN / f"{golden}.yaml").write_text(text)
