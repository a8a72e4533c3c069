"""Names on Kubernetes: what the operator makes and shards, gateways, chart and tests look for. Pure.

Promise: a name is composed here and nowhere else, so that two parts never look for two things. Must not be done here:
asking the API server, or deciding anything.
"""

from __future__ import annotations

from typing import Final, NamedTuple
from urllib.parse import quote

from fleetlm_common.ids import ShardName


class Resource(NamedTuple):
    """A kind of object and where it lives: `api` is `v1` or group/version."""

    api: str
    kind: str
    plural: str

    def path(self, namespace: str | None, name: str | None = None, subresource: str | None = None) -> str:
        """The path below the server's address; without namespace, of all of them."""
        parts = ["", "api" if "/" not in self.api else "apis", self.api]
        if namespace is not None:
            parts += ["namespaces", quote(namespace, safe="")]
        parts += [part for part in (self.plural, name and quote(name, safe=""), subresource) if part]
        return "/".join(parts)


GROUP: Final = "fleetlm.io"
API: Final = f"{GROUP}/v1alpha1"

SHARD_RINGS: Final = Resource(API, "ShardRing", "shardrings")
RING_MAPS: Final = Resource(API, "RingMap", "ringmaps")
LEASES: Final = Resource("coordination.k8s.io/v1", "Lease", "leases")

RING_LABEL: Final = "fleetlm.io/ring"
"""On everything of a ring: the ring's name."""
NAME_LABEL: Final = "app.kubernetes.io/name"
INSTANCE_LABEL: Final = "app.kubernetes.io/instance"
COMPONENT_LABEL: Final = "app.kubernetes.io/component"
MANAGER_LABEL: Final = "app.kubernetes.io/managed-by"
MANAGER: Final = "fleetlm-operator"
"""The operator: value of the label managed-by and field manager of server-side apply, for ever the same."""
ENDPOINT_ANNOTATION: Final = "fleetlm.io/endpoint"
"""On a shard's Lease: its announcement, a ShardEndpoint as JSON."""

CLIENT_PORT: Final = 4000
GATEWAY_OPS_PORT: Final = 4001
SHARD_PORT: Final = 4100
SHARD_OPS_PORT: Final = 4101
OPERATOR_OPS_PORT: Final = 4200

DATA_CLAIM: Final = "data"
DATA_MOUNT: Final = "/data"
DATA_FOLDER: Final = "/data/volume"
"""Below the mount: the root of a volume may hold `lost+found` and be owned by somebody else."""
CREDENTIAL_KEY: Final = "credential"
CREDENTIAL_MOUNT: Final = "/etc/fleetlm/credential"

CONTROL_SCHEME: Final = "kubernetes:"


def shard_workload(ring: str) -> str:
    """StatefulSet and ServiceAccount of the shards; pods are `<this>-<ordinal>`, and so are their Leases."""
    return f"{ring}-shard"


def shard_pod(ring: str, ordinal: int) -> str:
    """A shard's pod, and the Lease of its announcement."""
    return f"{shard_workload(ring)}-{ordinal}"


def shard_service(ring: str) -> str:
    """The headless Service that gives shards their host names."""
    return f"{ring}-shards"


def shard_claim(ring: str, ordinal: int) -> str:
    """The PersistentVolumeClaim of a shard."""
    return f"{DATA_CLAIM}-{shard_pod(ring, ordinal)}"


def gateway_workload(ring: str) -> str:
    """Deployment, ServiceAccount and Service of the gateways."""
    return f"{ring}-gateway"


def credential_secret(ring: str) -> str:
    """The secret between gateways and shards."""
    return f"{ring}-credential"


def shard_name(ordinal: int) -> ShardName:
    """A shard's name in the ring map."""
    return ShardName(f"shard-{ordinal}")


def ordinal_of(shard: ShardName) -> int:
    """The inverse of `shard_name`.

    Raises:
        ValueError: not a shard's name.
    """
    prefix, _, number = shard.rpartition("-")
    if prefix != "shard" or not number.isdecimal():
        raise ValueError(f"{shard!r} is not shard-<ordinal>")
    return int(number)


def ring_labels(ring: str, component: str | None = None) -> dict[str, str]:
    """Labels of everything that the operator makes for a ring."""
    labels = {NAME_LABEL: "fleetlm", INSTANCE_LABEL: ring, MANAGER_LABEL: MANAGER, RING_LABEL: ring}
    return labels if component is None else {**labels, COMPONENT_LABEL: component}


def selector(ring: str, component: str) -> dict[str, str]:
    """The labels that pods of a component are found by; fixed for life (a StatefulSet's selector cannot change)."""
    return {NAME_LABEL: "fleetlm", INSTANCE_LABEL: ring, COMPONENT_LABEL: component}


def control_url(namespace: str, ring: str) -> str:
    """Value of `FLEETLM_SHARD_CONTROL` and `FLEETLM_GATEWAY_CONTROL`."""
    return f"{CONTROL_SCHEME}{namespace}/{ring}"
