"""What runs on a cluster stands on: images, a cluster, a command in the client's network, and away with it.

A cluster that is up is used and left up; one that this run brought up is taken down at its end. What a dead run left
goes first. Needs what `make cluster` and `make images` need; says what is missing and fails.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.cluster import binaries, images, kind, lifecycle, nodes, paths, processes
from tests.cluster.say import ClusterError, Step, say
from tests.e2e.published import CLUSTER_GOES, UPGRADE, published

LOCK: Final = Path("/run/fleetlm-e2e.lock")
"""One run a machine: two would take each other's nodes away."""


def on_a_cluster(line: Sequence[str]) -> int:
    """Run a command in the client's network of a cluster; its exit code, or 1."""
    try:
        lifecycle.check_tools()
        with LOCK.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ClusterError(f"another run uses the cluster ({LOCK} is held)") from None
            return _run(line)
    except ClusterError as error:
        say(f"error: {error}")
        return 1


def _run(line: Sequence[str]) -> int:
    if not kind.asked():
        binaries.build()  # Helm, too: `make cluster` does without
    archive = images.archive()
    mine = not lifecycle.is_up()
    if mine:
        lifecycle.up(3, [archive])
    try:
        _load(archive.name, fresh=mine)
        return _in_client(line, cluster_goes=mine)
    finally:
        if mine:
            lifecycle.down()


def _load(name: str, *, fresh: bool) -> None:
    """The images of today, under the names that the chart and an upgrade ask for."""
    mark = paths.RUN / "loaded"
    if not fresh and (not mark.exists() or mark.read_text() != name):
        lifecycle.load(paths.IMAGES / name)
    with Step("names of images"):
        for node in lifecycle.node_names():
            for target in images.TARGETS:
                for other in (published(target), published(target, UPGRADE)):
                    nodes.ctr(node, "images", "tag", "--force", images.name(target), other)
    mark.write_text(name)


def _in_client(line: Sequence[str], *, cluster_goes: bool) -> int:
    env = os.environ | {
        "KUBECONFIG": str(paths.KUBECONFIG),
        "PATH": f"{paths.BINARIES}:{os.environ['PATH']}",
        CLUSTER_GOES: "1" if cluster_goes else "",
    }
    return subprocess.call(processes.in_host("client", *line), cwd=paths.ROOT, env=env)
