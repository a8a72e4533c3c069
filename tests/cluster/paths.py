"""Versions and places of the test cluster: the one module that names either.

Everything that costs time to make lies below `CACHE`, in folders named by version, so that two checkouts share it and a
new version never meets an old one's files. What belongs to the running cluster lies below `RUN`. Nothing here may touch
the disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

KUBERNETES: Final = "v1.36.3"
"""Built with Go 1.26. Go 1.27 changes encoding/json in a way that breaks `/openapi/v2`, and with it `kubectl apply`."""

CACHE: Final = Path.home() / ".cache" / "fleetlm"
BINARIES: Final = CACHE / f"kubernetes-{KUBERNETES}"
IMAGES: Final = CACHE / "images"
RUN: Final = Path("/var/lib/fleetlm-cluster")
"""A short path: kubelet and containerd keep sockets below it, whose paths must stay under 108 bytes."""

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parents[1]

PREFIX: Final = "flm-"
"""Names of network namespaces and cgroups of ours begin with it; whatever has it is ours to remove."""
FABRIC: Final = "10.88.0"
PODS: Final = "10.89"
SERVICES: Final = "10.90.0"
"""First octets of the hosts' network (/24), of the pods' (a /24 a node) and of the service range (/24)."""
KUBECONFIG: Final = RUN / "admin.kubeconfig"
REGISTRY: Final = "localhost"
"""Registry part of the images' names: nothing is ever pulled, so it names no server."""


def host_address(host: str) -> str:
    """The address of a host: `cp` is .10, `nodeN` .10+N, `client` .250."""
    if host.startswith("node"):
        return f"{FABRIC}.{10 + int(host.removeprefix('node'))}"
    return f"{FABRIC}.{ {'cp': 10, 'client': 250}[host] }"


def pod_subnet(number: int) -> str:
    """Pods of node `number`."""
    return f"{PODS}.{number}.0/24"
