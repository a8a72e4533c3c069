"""What can be said of `CLUSTER=kind` without a Docker engine: what it asks kind for, and who is asked for what."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster import kind, nodes
from tests.cluster.say import ClusterError

ROOT = Path(__file__).parents[1]


def test_kind_is_asked_for_a_control_plane_and_workers() -> None:
    """As many workers as the own cluster has nodes: rings spread over them."""
    found = yaml.safe_load(kind.config(3))
    assert [node["role"] for node in found["nodes"]] == ["control-plane", "worker", "worker", "worker"]
    assert found["name"] == kind.NAME


def test_the_kubeconfig_is_for_the_clients_network() -> None:
    """Credentials stay; the address is the API server's in the control plane's container."""
    theirs = {
        "clusters": [
            {
                "name": "kind-fleetlm",
                "cluster": {"server": "https://127.0.0.1:39817", "certificate-authority-data": "x"},
            }
        ],
        "users": [{"name": "kind-fleetlm", "user": {"client-key-data": "y"}}],
    }
    found = yaml.safe_load(kind.kubeconfig(yaml.safe_dump(theirs)))
    cluster = {"server": "https://127.0.0.1:6443", "certificate-authority-data": "x"}
    assert found == {**theirs, "clusters": [{"name": "kind-fleetlm", "cluster": cluster}]}


def test_nodes_are_containers_only_when_kind_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same callers, another way in."""
    monkeypatch.delenv("CLUSTER", raising=False)
    assert nodes.ctr_line("node1", "version")[0] == "ctr"
    monkeypatch.setenv("CLUSTER", "kind")
    assert nodes.ctr_line("fleetlm-worker", "version") == [
        "docker",
        "exec",
        "fleetlm-worker",
        "ctr",
        "-n",
        "k8s.io",
        "version",
    ]
    monkeypatch.setenv("CLUSTER", "minikube")
    with pytest.raises(ClusterError, match="there are own"):
        kind.asked()


def test_the_tests_that_are_left_out_are_there() -> None:
    """A file that was renamed would be run, and fail for the wrong reason."""
    there = {path.name for path in (ROOT / "tests" / "e2e").glob("test_*.py")}
    assert set(kind.NOT_THERE) <= there


def test_without_docker_it_says_so() -> None:
    """And changes nothing."""
    line = [sys.executable, "-m", "tests.cluster", "up"]
    done = subprocess.run(
        line,
        cwd=ROOT,
        env={"CLUSTER": "kind", "PATH": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "error: " in done.stdout + done.stderr
    assert "kind" in done.stdout + done.stderr
