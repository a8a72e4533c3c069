"""A ShardRing as the operator reads it: the schema of `crds/` as types. Pure.

Promise: each default equals the schema's (a test compares them), so that a ring means the same to the API server and to
the operator. Must not be done here: checks that the schema makes (an object that was stored has passed them).
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from fleetlm_common.ids import ShardName, Slot
from fleetlm_common.kubeapi import Object


class Part(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """A part of the spec; what a newer schema adds is ignored until this operator knows it."""


class Image(Part, frozen=True):
    """Where images come from."""

    registry: str = ""
    shard: str = ""
    gateway: str = ""
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()


class Storage(Part, frozen=True):
    """The volume of each shard."""

    size: str = "10Gi"
    class_name: str = ""


class Log(Part, frozen=True):
    """How messages become durable."""

    fsync: Literal["always", "interval", "never"] = "always"
    fsync_interval_milliseconds: int = 100
    segment_size: str = "64Mi"


class Hot(Part, frozen=True):
    """Memory of each shard."""

    max_bytes: str = "256Mi"


class Retention(Part, frozen=True):
    """When messages may be deleted."""

    max_bytes: str = "0"
    max_age_seconds: int = 0


class SecretKey(Part, frozen=True):
    """One key of a Secret."""

    name: str
    key: str = "url"


class Archive(Part, frozen=True):
    """PostgreSQL that gets every message."""

    secret_ref: SecretKey
    max_age_seconds: int = 0


class Idempotency(Part, frozen=True):
    """How long keys are remembered."""

    window_seconds: int = 900
    max_keys: int = 100_000


class Resources(Part, frozen=True):
    """Requests and limits, by name."""

    requests: dict[str, int | str] = msgspec.field(default_factory=dict[str, int | str])
    limits: dict[str, int | str] = msgspec.field(default_factory=dict[str, int | str])


class Spread(Part, frozen=True):
    """Over which label of nodes pods are spread."""

    topology_key: str
    max_skew: int = 1
    when_unsatisfiable: str = "ScheduleAnyway"


class Scheduling(Part, frozen=True):
    """Where pods may run."""

    node_selector: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    tolerations: tuple[dict[str, Any], ...] = ()
    spread: tuple[Spread, ...] = (Spread(topology_key="kubernetes.io/hostname"),)
    priority_class_name: str = ""


class GatewayService(Part, frozen=True):
    """The Service that clients connect to."""

    type: str = "ClusterIP"
    annotations: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    load_balancer_class: str = ""


class Gateway(Part, frozen=True):
    """The gateways."""

    replicas: int = 2
    origins: tuple[str, ...] = ()
    sockets: int = 10_000
    drain_window_seconds: int = 10
    service: GatewayService = GatewayService()
    resources: Resources = Resources()
    scheduling: Scheduling = Scheduling()


class Update(Part, frozen=True):
    """How changes reach the shards."""

    strategy: Literal["InPlace", "Handover"] = "Handover"
    max_unavailable: int = 1
    min_ready_seconds: int = 0
    progress_deadline_seconds: int = 600


class Drain(Part, frozen=True):
    """How a shard leaves."""

    timeout_seconds: int = 5
    termination_grace_period_seconds: int = 60


class Network(Part, frozen=True):
    """NetworkPolicies."""

    enabled: bool = True
    ops_namespaces: tuple[str, ...] = ()


class VolumeRetention(Part, frozen=True):
    """What becomes of volumes."""

    when_deleted: Literal["Retain", "Delete"] = "Retain"
    when_scaled: Literal["Retain", "Delete"] = "Retain"


class PinnedSlots(Part, frozen=True):
    """Slots `first` to `last` are wanted on `shard`."""

    first: Slot
    last: Slot
    shard: ShardName


class ForgottenVolume(Part, frozen=True):
    """`shard` is dead for good, as long as it is bound to this volume."""

    shard: ShardName
    volume: str


class Spec(Part, frozen=True):
    """What is asked for."""

    replicas: int = 3
    slots: int = 512
    version: str = ""
    image: Image = Image()
    storage: Storage = Storage()
    log: Log = Log()
    hot: Hot = Hot()
    retention: Retention = Retention()
    archive: Archive | None = None
    idempotency: Idempotency = Idempotency()
    resources: Resources = Resources()
    scheduling: Scheduling = Scheduling()
    gateway: Gateway = Gateway()
    update: Update = Update()
    drain: Drain = Drain()
    network_policy: Network = Network()
    volume_retention: VolumeRetention = VolumeRetention()
    given_up_volumes: tuple[str, ...] = ()
    forgotten_volumes: tuple[ForgottenVolume, ...] = ()
    cordoned: tuple[ShardName, ...] = ()
    pins: tuple[PinnedSlots, ...] = ()
    deletion_policy: Literal["Delete", "Orphan"] = "Delete"
    paused: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class Condition(Part, frozen=True):
    """One condition of the status."""

    type: str
    status: str
    reason: str
    message: str
    last_transition_time: str
    observed_generation: int = 0


class Images(Part, frozen=True):
    """Images that a ring is at, or goes to."""

    shard: str = ""
    gateway: str = ""


class Operation(Part, frozen=True):
    """What is under way."""

    kind: str
    since: str = ""
    done: int = 0
    total: int = 0
    subject: str = ""


class OldStatus(Part, frozen=True):
    """What the status said before, as far as it is a memory: images, times, whether there was a map."""

    epoch: int = 0
    images: Images = Images()
    operation: Operation | None = None
    conditions: tuple[Condition, ...] = ()


class Ring(msgspec.Struct, frozen=True, kw_only=True):
    """One ShardRing."""

    name: str
    namespace: str
    uid: str
    generation: int
    deleting: bool
    spec: Spec
    status: OldStatus
    status_object: dict[str, Any]
    """The status as it stands, to be compared with the one that is to be written."""


class _Metadata(Part, frozen=True):
    name: str
    namespace: str
    uid: str
    generation: int = 0
    deletion_timestamp: str | None = None


class _ShardRing(Part, frozen=True):
    metadata: _Metadata
    spec: Spec = Spec()
    status: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])


def ring_from(found: Object) -> Ring:
    """The ring that an object of the API server describes.

    Raises:
        ValueError: it does not fit the schema that this operator knows.
    """
    given = msgspec.convert(found, _ShardRing)
    meta = given.metadata
    return Ring(
        name=meta.name,
        namespace=meta.namespace,
        uid=meta.uid,
        generation=meta.generation,
        deleting=meta.deletion_timestamp is not None,
        spec=given.spec,
        status=msgspec.convert(given.status, OldStatus),
        status_object=given.status,
    )
