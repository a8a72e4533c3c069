"""What was seen of one ring at one moment: the plan's only input. Pure.

Promise: everything a decision rests on is here, read afresh for each step (no caches), as types: the API server's JSON
ends at this border. Must not be done here: asking the API server (`kubeworld.py`), deciding.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import msgspec

from fleetlm_common.control import ShardEndpoint
from fleetlm_common.ids import ShardName
from fleetlm_common.kubeapi import Object
from fleetlm_common.ring import RingMap
from fleetlm_operator.ringspec import Ring


class Json(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """A part of an API object; what is not named here does not matter to the operator."""


class Owner(Json, frozen=True):
    """An owner reference."""

    kind: str
    name: str
    uid: str
    controller: bool = False


class Meta(Json, frozen=True):
    """Metadata of any object."""

    name: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None
    labels: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    annotations: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    owner_references: tuple[Owner, ...] = ()


class Existing(msgspec.Struct, frozen=True):
    """A child as it is there: `body` for the look whether what was applied is still so."""

    meta: Meta
    body: Object


class PodCondition(Json, frozen=True):
    """A pod's condition."""

    type: str
    status: str
    reason: str = ""
    message: str = ""
    last_transition_time: datetime | None = None


class Waiting(Json, frozen=True):
    """Why a container does not run."""

    reason: str = ""
    message: str = ""


class Terminated(Json, frozen=True):
    """How a container ended."""

    reason: str = ""
    message: str = ""
    exit_code: int = 0


class ContainerState(Json, frozen=True):
    """A container now, or before."""

    waiting: Waiting | None = None
    terminated: Terminated | None = None


class ContainerStatus(Json, frozen=True):
    """A container."""

    name: str = ""
    restart_count: int = 0
    state: ContainerState = ContainerState()
    last_state: ContainerState = ContainerState()


class PodStatus(Json, frozen=True):
    """A pod's status."""

    phase: str = ""
    pod_ip: str = msgspec.field(default="", name="podIP")
    conditions: tuple[PodCondition, ...] = ()
    container_statuses: tuple[ContainerStatus, ...] = ()


class PodSpec(Json, frozen=True):
    """Where a pod is."""

    node_name: str = ""


class Pod(Json, frozen=True):
    """A shard's pod."""

    metadata: Meta
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()


class ShardWord(msgspec.Struct, frozen=True):
    """What a shard says of itself: whether it is ready, a stable reason, a sentence."""

    ok: bool
    reason: str
    message: str = ""


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """A shard's PersistentVolumeClaim."""

    name: str
    requested_bytes: int
    capacity_bytes: int
    """0 while it has no volume."""


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """The StatefulSet or the Deployment as far as decisions rest on it."""

    uid: str
    replicas: int
    """Pods that it is told to have."""
    settled: bool
    """Its controller has seen its newest spec."""
    template: str
    """Value of the template label."""
    rendering: int
    image: str
    members: frozenset[int] = frozenset()
    """Ordinals of the members that whoever wrote it last saw."""
    claim_size: str = ""
    """Size in the claim template, as written."""
    ready: int = 0
    updated: int = 0
    pods: int = 0
    """All of them, those of an earlier template too."""
    available: int = 0
    stuck: str = ""
    """The Deployment's own word that it makes no progress."""
    short_since: datetime | None = None
    """Since when fewer pods are available than the Deployment should have."""
    terminating: bool = False


class MapSeen(msgspec.Struct, frozen=True, kw_only=True):
    """The RingMap object."""

    ring_uid: str
    slots: int
    shards: int
    map: RingMap | None
    version: str
    """resourceVersion: the swap's precondition."""
    in_place: tuple[ShardName, ...] = ()
    """Shards that were told to wait for nobody when they are asked to end."""


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """One ring and everything that belongs to it.

    `children` holds what is there under the names that the ring's children have, by `Child.key`, whoever made it.
    """

    ring: Ring
    now: datetime
    map_seen: MapSeen | None
    map_error: str = ""
    """The RingMap is there and cannot be understood."""
    stateful_set: Workload | None
    deployment: Workload | None
    pods: Mapping[int, Pod]
    """By ordinal."""
    claims: Mapping[int, Claim]
    endpoints: Mapping[ShardName, ShardEndpoint]
    children: Mapping[str, Existing]
    words: Mapping[int, ShardWord]
    """What shards say of themselves, by ordinal; one that did not answer is left out."""
    credential_whole: bool
    """The Secret has its key."""
    cordoned_nodes: frozenset[str] = frozenset()
    """Nodes that take no pods; none where the operator may not look at nodes."""


def object_meta(found: Object) -> Meta:
    """The metadata of an object."""
    return msgspec.convert(found["metadata"], Meta)


def pod_from(found: Object) -> Pod:
    """A pod."""
    return msgspec.convert(found, Pod)


def condition_of(pod: Pod, kind: str) -> PodCondition | None:
    """The pod's condition of that type."""
    return next((condition for condition in pod.status.conditions if condition.type == kind), None)


def is_ready(pod: Pod) -> bool:
    """Ready and not on its way out."""
    condition = condition_of(pod, "Ready")
    return pod.metadata.deletion_timestamp is None and condition is not None and condition.status == "True"


def same_where_asked(asked: object, there: object) -> bool:
    """Whether `there` has everything that `asked` says; fields that it has besides are somebody else's.

    Lists count as a whole: an entry that somebody added to a list of ours is looked at anew each time, which applies it
    again and changes nothing.
    """
    match asked, there:
        case dict(), dict():
            return all(key in there and same_where_asked(value, there[key]) for key, value in asked.items())
        case list(), list():
            same_length = len(asked) == len(there)
            return same_length and all(same_where_asked(one, other) for one, other in zip(asked, there, strict=True))
        case _:
            return asked == there
