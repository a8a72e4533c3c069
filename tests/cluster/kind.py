"""The same cluster by kind, for machines that have Docker: `make cluster CLUSTER=kind`, `make e2e CLUSTER=kind`.

Nodes are containers; the client is whoever is in the network of the control plane's container, where Service addresses
are routed. Promise: what `lifecycle`, `nodes` and `processes` promise their callers, but for faults of the cluster's
own processes: kind has none of our records, so tests that make them are left out, with a word. Where this was written
there is no Docker engine: **it has not been run**; its commands were compared with what kind 0.30 says it takes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import yaml

from tests.cluster import paths
from tests.cluster.say import ClusterError, Step

NAME: Final = "fleetlm"
CONTROL_PLANE: Final = f"{NAME}-control-plane"
API_PORT: Final = 6443
"""Of the API server in the network of the control plane's container; its certificate is good for 127.0.0.1."""
TOOLS: Final = ("docker", "kind", "kubectl", "helm", "nsenter")
UP_S: Final = 600.0
"""kind may have to pull its node image."""
NOT_THERE: Final = ("test_control_plane.py", "test_nodes.py", "test_volumes.py")
"""Tests that stop or freeze the cluster's own processes, or need the StorageClasses of `storage.py`."""


def asked() -> bool:
    """Whether the environment asks for kind.

    Raises:
        ClusterError: it asks for something else that there is not.
    """
    wish = os.environ.get("CLUSTER", "")
    if wish not in {"", "own", "kind"}:
        raise ClusterError(f"CLUSTER={wish} is not known; there are own (the default) and kind")
    return wish == "kind"


def check_tools() -> None:
    """Whether this machine can have a cluster of kind's.

    Raises:
        ClusterError: says what is missing.
    """
    if os.geteuid() != 0:
        raise ClusterError("root is needed to enter the network of kind's containers")
    absent = [name for name in TOOLS if shutil.which(name) is None]
    if absent:
        raise ClusterError(f"missing for CLUSTER=kind: {', '.join(absent)}")
    _run("docker", "info")


def config(workers: int) -> str:
    """What kind is told to make."""
    nodes = [{"role": "control-plane"}, *({"role": "worker"} for _ in range(workers))]
    return yaml.safe_dump({"kind": "Cluster", "apiVersion": "kind.x-k8s.io/v1alpha4", "name": NAME, "nodes": nodes})


def kubeconfig(external: str) -> str:
    """The administrator's, from kind's own, for the client's network."""
    found = yaml.safe_load(external)
    for each in found["clusters"]:
        each["cluster"]["server"] = f"https://127.0.0.1:{API_PORT}"
    return yaml.safe_dump(found)


def is_up() -> bool:
    """Whether kind has it."""
    return paths.KUBECONFIG.exists() and NAME in _run("kind", "get", "clusters").split()


def node_names() -> list[str]:
    """The workers."""
    return sorted(set(_run("kind", "get", "nodes", "--name", NAME).split()) - {CONTROL_PLANE})


def up(count: int, archives: list[Path]) -> None:
    """Bring it up with the images of `archives`.

    Raises:
        ClusterError: a tool is missing, or kind failed, in its words.
    """
    check_tools()
    with Step(f"kind: cluster of {count} nodes"), tempfile.TemporaryDirectory() as scratch:
        asked_for = Path(scratch) / "kind.yaml"
        asked_for.write_text(config(count))
        unused = Path(scratch) / "kubeconfig"  # kind would write into the person's own
        _run("kind", "create", "cluster", "--config", asked_for, "--kubeconfig", unused, "--wait", "120s")
    paths.RUN.mkdir(parents=True, exist_ok=True, mode=0o711)
    paths.KUBECONFIG.write_text(kubeconfig(_run("kind", "get", "kubeconfig", "--name", NAME)))
    paths.KUBECONFIG.chmod(0o600)
    for archive in archives:
        load(archive)


def down() -> None:
    """Remove it; nothing there is nothing to do."""
    with Step("kind: cluster down"), tempfile.TemporaryDirectory() as scratch:
        _run("kind", "delete", "cluster", "--name", NAME, "--kubeconfig", Path(scratch) / "kubeconfig")
        shutil.rmtree(paths.RUN, ignore_errors=True)


def load(archive: Path) -> None:
    """Import an image archive into every node."""
    with Step(f"kind loads {archive.name}"):
        _run("kind", "load", "image-archive", archive, "--name", NAME)


def ctr_line(node: str, *arguments: object) -> list[str]:
    """The command line of containerd's client on a node."""
    return ["docker", "exec", node, "ctr", "-n", "k8s.io", *map(str, arguments)]


def in_client(*command: object) -> list[str]:
    """The command line that runs `command` in the client's network."""
    (found,) = json.loads(_run("docker", "inspect", CONTROL_PLANE))
    return ["nsenter", f"--net=/proc/{found['State']['Pid']}/ns/net", *map(str, command)]


def _run(*command: object) -> str:
    line = [str(word) for word in command]
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=UP_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"{' '.join(line)}: {error}") from error
    if done.returncode:
        raise ClusterError(f"{' '.join(line)}: exit {done.returncode}: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout
