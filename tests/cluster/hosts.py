"""Hosts as network namespaces on one bridge: control plane, nodes, client.

Nothing of it touches the machine's own network, and each node has its own kube-proxy rules and pod subnet. Processes
see the machine's files and processes all the same: a test in the client's namespace can kill a container by pid.
"""

from __future__ import annotations

from tests.cluster import paths
from tests.cluster.processes import run
from tests.cluster.say import ClusterError


def make(nodes: int) -> None:
    """Makes the bridge and every host with its address and routes."""
    hosts = ["cp", "client", *(f"node{number}" for number in range(1, nodes + 1))]
    run("ip", "netns", "add", f"{paths.PREFIX}fabric")
    run("ip", "link", "add", "br0", "type", "bridge", host="fabric")
    run("ip", "link", "set", "br0", "up", host="fabric")
    for host in hosts:
        _make_host(host)
        for number in range(1, nodes + 1):
            if host != f"node{number}":
                via = paths.host_address(f"node{number}")
                run("ip", "route", "add", paths.pod_subnet(number), "via", via, host=host)
        if host.startswith("node"):
            # kube-proxy does not run, and pods do not reach service addresses, without a default route.
            run("ip", "route", "add", "default", "via", paths.host_address("cp"), host=host)
        else:  # these have no kube-proxy: service addresses go through the first node's
            run("ip", "route", "add", f"{paths.SERVICES}.0/24", "via", paths.host_address("node1"), host=host)


def remove() -> list[str]:
    """Deletes every namespace of ours; returns what could not be deleted."""
    left: list[str] = []
    for line in run("ip", "netns", "list").splitlines():
        name = line.split()[0] if line.strip() else ""
        if name.startswith(paths.PREFIX):
            try:
                run("ip", "netns", "del", name)
            except ClusterError as error:
                left.append(str(error))
    return left


def _make_host(host: str) -> None:
    name, fabric = f"{paths.PREFIX}{host}", f"{paths.PREFIX}fabric"
    run("ip", "netns", "add", name)
    run("ip", "link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"v-{host}", "netns", fabric)
    run("ip", "link", "set", f"v-{host}", "master", "br0", "up", host="fabric")
    run("ip", "link", "set", "lo", "up", host=host)
    run("ip", "addr", "add", f"{paths.host_address(host)}/24", "dev", "eth0", host=host)
    run("ip", "link", "set", "eth0", "up", host=host)
    run("sysctl", "-qw", "net.ipv4.ip_forward=1", host=host)
