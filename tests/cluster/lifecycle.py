"""Cluster up, cluster down. Down works on whatever an up or a dead test run left, and on nothing at all.

One cluster a machine: both take the lock for as long as they work, and `up` refuses when one is there. What is removed
is found by records and by names that begin with `paths.PREFIX` or lie below `paths.RUN`, never by a program's name.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from tests.cluster import binaries, cgroups, controlplane, hosts, identities, kind, nodes, paths, processes
from tests.cluster.say import ClusterError, Step, say
from tests.cluster.waiting import until

LOCK: Final = Path("/run/fleetlm-cluster.lock")
UP: Final = paths.RUN / "up"
"""Its presence says that bring-up ended well; its text is the number of nodes."""
NODES_READY_TIMEOUT_S: Final = 120.0
TOOLS: Final = ("containerd", "runc", "nft", "iptables", "ip", "nsenter", "openssl", "sysctl")
PACKAGES: Final = "containerd runc containernetworking-plugins nftables iptables conntrack iproute2 openssl"


def is_up() -> bool:
    """Whether a cluster was brought up whole and its API server still runs."""
    if kind.asked():
        return kind.is_up()
    return UP.exists() and any(p.name == "kube-apiserver" and processes.alive(p) for p in processes.records())


def node_names() -> list[str]:
    """The nodes of the cluster that is up."""
    if kind.asked():
        return kind.node_names()
    return [f"node{number}" for number in range(1, int(UP.read_text()) + 1)]


def load(archive: Path) -> None:
    """Imports an image archive into every node."""
    if kind.asked():
        kind.load(archive)
        return
    for node in node_names():
        with Step(f"{node} loads {archive.name}"):
            nodes.load(node, archive)


def up(count: int, archives: list[Path]) -> None:
    """Brings up `count` nodes with the images of `archives`; what a dead run left is removed first.

    Args:
        count: of nodes.
        archives: of images; every node gets them.

    Raises:
        ClusterError: one is up already, a tool is missing, or a part did not come up; logs are printed then.
    """
    check_tools()
    with _locked():
        if is_up():
            raise ClusterError("a cluster is up already; `make cluster-down` removes it")
        if kind.asked():
            kind.up(count, archives)
            return
        _remove()
        binaries.build([p for p in binaries.PROGRAMS if not p.name.startswith("helm")])
        try:
            with Step(f"cluster of {count} nodes"):
                _bring_up(count, archives)
        except ClusterError:
            _print_logs()
            raise
    say(f"kubeconfig: {paths.KUBECONFIG}")
    say("commands reach it from its client's network: .venv/bin/python -m tests.cluster exec kubectl get nodes")


def down() -> None:
    """Removes the cluster, whole or in part.

    Raises:
        ClusterError: something could not be removed; says what.
    """
    with _locked():
        if kind.asked():
            kind.down()
            return
        with Step("cluster down"):
            _remove()


def _bring_up(count: int, archives: list[Path]) -> None:
    paths.RUN.mkdir(parents=True, mode=0o711)
    hosts.make(count)
    identities.make(count)
    controlplane.start()
    nodes.start_all(count, archives)
    kubelets = [f"kubelet-node{number}" for number in range(1, count + 1)]
    until(
        "every node Ready",
        lambda: controlplane.kubectl("get", "nodes", "--no-headers").count(" Ready") == count,
        timeout_s=NODES_READY_TIMEOUT_S,
        watch=lambda: processes.must_live(*kubelets),
    )
    UP.write_text(str(count))


def _remove() -> None:
    """Kubelets end first, for they would start again what is ended after them; then containers, then the rest."""
    found = processes.records()
    for process in sorted(found, key=lambda each: (not each.name.startswith("kubelet"), -each.order)):
        # Nobody needs what they would write: kills are quicker than goodbyes, and a frozen process takes them too.
        processes.send(process, signal.SIGKILL)
    for process in found:
        processes.stop(process, kill=True)
    _kill_containers()
    _unmount()
    left = hosts.remove() if shutil.which("ip") else []
    left += cgroups.remove()
    if paths.RUN.exists():
        shutil.rmtree(paths.RUN)
    if left:
        raise ClusterError("not everything could be removed:\n" + "\n".join(left))


def _kill_containers() -> None:
    """Containers by our cgroups, then their shims by the folder that they were told: both outlive containerd."""

    def gone() -> bool:
        cgroups.kill_all()
        for pid in _shims():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not cgroups.members() and not _shims()

    until("containers end", gone, timeout_s=30)


def _shims() -> list[int]:
    found: list[int] = []
    for place in Path("/proc").iterdir():
        if not place.name.isdigit():
            continue
        with suppress(OSError):
            words = (place / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "containerd-shim" in words[0] and any(word.startswith(f"{paths.RUN}/") for word in words):
                found.append(int(place.name))
    return found


def _unmount() -> None:
    lines = Path("/proc/mounts").read_text().splitlines()
    ours = [line.split()[1] for line in lines if line.split()[1].startswith(f"{paths.RUN}/")]
    for place in sorted(ours, key=len, reverse=True):
        processes.run("umount", "--lazy", place)


def _print_logs() -> None:
    for process in processes.records():
        state = "runs" if processes.alive(process) else "HAS ENDED"
        say(f"--- {process.name} ({state}), the end of {processes.LOGS / process.name}.log")
        say(processes.tail(process.name))


def check_tools() -> None:
    """Whether this machine can have a cluster.

    Raises:
        ClusterError: not root, or something is not installed; says what and how.
    """
    if kind.asked():
        kind.check_tools()
        return
    if os.geteuid() != 0:
        raise ClusterError("network namespaces and containers need root")
    absent = [name for name in TOOLS if shutil.which(name) is None]
    if absent or not Path("/usr/lib/cni/bridge").exists():
        raise ClusterError(f"missing: {', '.join(absent) or 'CNI plugins'}; apt-get install {PACKAGES}")


@contextmanager
def _locked() -> Generator[None]:
    with LOCK.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ClusterError(f"another process brings a cluster up or down ({LOCK} is held)") from error
        yield
