"""One ring: what was observed → what to do now. Pure.

    another owner's objects in the way, a map that cannot be understood, paused, deletion → nothing, and it is said
    children that are missing or not as asked                                           → apply
    every volume announced and no map                                                   → the first map, by `planning`
    claims smaller than asked                                                           → grow
    pods that are not as asked                                                          → `rolling`, one at a time
    slots that are not where they should be                                             → moves, by `planning`

Promise: level-triggered: the same observation gives the same actions; each is safe when done twice, by two operators,
or late (apply, create, compare-and-swap, delete by uid). A pod that owns slots goes only to come back.
Must not be done here: I/O, wording of the status (`verdict.py`).
"""

from __future__ import annotations

from typing import Final

import msgspec

from fleetlm_common.ids import ShardName
from fleetlm_common.kubeapi import Object
from fleetlm_common.kubenames import LEASES, MANAGER, MANAGER_LABEL, RING_LABEL, SHARD_RINGS, Resource, shard_pod
from fleetlm_common.ring import RingMap
from fleetlm_operator import planning
from fleetlm_operator.manifests import (
    APPLIED_ANNOTATION,
    credential,
    finished,
    furniture,
    ring_map,
    unwanted_policies,
)
from fleetlm_operator.membership import cordons, going, map_of, members_text, pods_needed, view_of
from fleetlm_operator.memory import NO_MEMORY, Memory
from fleetlm_operator.observed import Observed, Workload, is_ready, same_where_asked
from fleetlm_operator.quantity import bytes_of
from fleetlm_operator.resources import (
    DEPLOYMENTS,
    NETWORK_POLICIES,
    PODS,
    STATEFUL_SETS,
    Child,
)
from fleetlm_operator.ringspec import Images, Ring
from fleetlm_operator.rolling import Roll, replaced_in_place, roll
from fleetlm_operator.workloads import RENDERING, RENDERINGS, TEMPLATE_LABEL, deployment, stateful_set

RENDERING_ANNOTATION: Final = "fleetlm.io/rendering"
"""On the StatefulSet: the rendering of its template."""
MEMBERS_ANNOTATION: Final = "fleetlm.io/members"
"""On the StatefulSet: ordinals of the ring map's members when it was written."""
FOREIGN_NAMED_MAX: Final = 3
"""Objects in the way that are named; one is enough to begin with."""


class Defaults(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator adds to a spec that does not say; never changes what a ring already runs."""

    registry: str
    version: str
    namespace: str
    """The operator's own."""


class Apply(msgspec.Struct, frozen=True):
    """Server-side apply; `version` of what is there now shows afterwards whether that changed anything.

    `guarded`: only if it is still of that version.
    """

    child: Child
    why: str
    version: str = ""
    guarded: bool = False


class Create(msgspec.Struct, frozen=True):
    """Make it if it is not there; never overwrite it. `kubeworld` adds what must be secret."""

    child: Child
    why: str


class SwapMap(msgspec.Struct, frozen=True):
    """Write the RingMap's spec if nobody did meanwhile (`version`)."""

    version: str
    shards: int
    new: RingMap | None
    in_place: tuple[ShardName, ...]
    why: str


class Delete(msgspec.Struct, frozen=True):
    """Delete exactly this object."""

    resource: Resource
    name: str
    uid: str
    why: str
    orphan: bool = False


class Grow(msgspec.Struct, frozen=True):
    """Ask for a larger volume."""

    name: str
    size: str
    why: str


Action = Apply | Create | SwapMap | Delete | Grow


class Obstacle(msgspec.Struct, frozen=True):
    """Why nothing is done; `reason` is stable."""

    reason: str
    message: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to do and what it rests on."""

    actions: tuple[Action, ...]
    obstacle: Obstacle | None
    images: Images
    shards: int
    """Pods that the StatefulSet should have."""
    decision: planning.Decision | None
    roll: Roll
    growing: tuple[str, ...]
    """Claims that are smaller than asked."""
    moves: int
    """Moves in flight."""


def plan(seen: Observed, defaults: Defaults, memory: Memory = NO_MEMORY, *, now_s: float = 0.0) -> Plan:
    """Decide what to do about one ring.

    Args:
        seen: what was observed.
        defaults: what the operator adds to the spec.
        memory: of the decisions about moves before.
        now_s: monotonic.
    """
    ring = seen.ring
    images = images_of(seen, defaults)
    shards = pods_needed(seen)
    wanted = _wanted(seen, defaults, images, shards)
    template = _template_of(wanted)
    live = seen.stateful_set
    applied = live is not None and live.settled and live.template == template
    rolling = roll(seen, template=template, applied=applied)
    obstacle = _obstacle(seen, wanted)
    size = bytes_of(ring.spec.storage.size)
    growing = tuple(
        claim.name
        for _, claim in sorted(seen.claims.items())
        if claim.requested_bytes < size or 0 < claim.capacity_bytes < claim.requested_bytes
    )
    free = obstacle is None and not ring.spec.paused and not ring.deleting
    decision = None
    if seen.map_seen is not None:
        view = view_of(seen, cordons(seen, [*going(seen, template), *rolling.hands_over]))
        # A pod that is replaced in this very step must not find itself in a move that was sealed meanwhile.
        decision = planning.plan(view, memory, now_s=now_s, only_end=not free or bool(rolling.replace))
    actions: list[Action] = []
    if not free and decision is not None and decision.new_map is not None:
        actions += _map_changes(seen, decision, seen.map_seen.in_place if seen.map_seen else ())
    if free:
        actions += _repairs(seen, wanted)
        actions += _left_behind(seen, shards)
        actions += _map_changes(seen, decision, replaced_in_place(seen, rolling))  # before the pods are asked to end
        actions += [
            Grow(claim.name, ring.spec.storage.size, f"grow {claim.name} to {ring.spec.storage.size}")
            for _, claim in sorted(seen.claims.items())
            if claim.requested_bytes < size
        ]
        actions += [
            Delete(PODS, pod.metadata.name, pod.metadata.uid, f"replace {pod.metadata.name}") for pod in rolling.replace
        ]
        actions += _new_claim_template(seen, rolling, size)
    return Plan(
        actions=tuple(actions),
        obstacle=obstacle,
        images=images,
        shards=shards,
        decision=decision,
        roll=rolling,
        growing=growing,
        moves=0 if (ring_map := map_of(seen)) is None else len(ring_map.moves),
    )


def images_of(seen: Observed, defaults: Defaults) -> Images:
    """The images to run: what the spec names; what it leaves out stays as it is.

    A spec without version gets the operator's when the ring is made and keeps it: an upgrade of the operator changes no
    ring.
    """
    spec = seen.ring.spec
    before = seen.ring.status.images
    shard = before.shard or (seen.stateful_set.image if seen.stateful_set else "")
    gateway = before.gateway or (seen.deployment.image if seen.deployment else "")
    registry = spec.image.registry or defaults.registry
    named = bool(spec.version or spec.image.registry)

    def image(component: str, whole: str, kept: str) -> str:
        if whole:
            return whole
        if kept and not named:
            return kept
        version = spec.version or kept.rpartition("/")[2].partition("@")[0].partition(":")[2] or defaults.version
        prefix = f"{registry}/" if registry else ""
        return f"{prefix}fleetlm-{component}:{version}"

    return Images(shard=image("shard", spec.image.shard, shard), gateway=image("gateway", spec.image.gateway, gateway))


def _wanted(seen: Observed, defaults: Defaults, images: Images, shards: int) -> list[Child]:
    """Every child as it should be, those that others need first."""
    ring = seen.ring
    live = seen.stateful_set
    keep = ring.spec.volume_retention.when_deleted == "Retain"
    claim_size = live.claim_size if live is not None and live.claim_size else ring.spec.storage.size
    parts = [finished(child, ring) for child in furniture(ring, shards=shards, operator_namespace=defaults.namespace)]
    rendering = _rendering(ring, live, images, shards=shards, claim_size=claim_size)
    body = stateful_set(ring, images, replicas=shards, claim_size=claim_size, rendering=rendering)
    shard_set = finished(Child(STATEFUL_SETS, _annotated(body, rendering, members_text(seen))), ring)
    gateways = finished(Child(DEPLOYMENTS, deployment(ring, _gateway_images(seen, images, shard_set))), ring)
    return [
        finished(credential(ring), ring),
        finished(ring_map(ring), ring, outlives=keep),
        *parts,
        shard_set,
        gateways,
    ]


def _rendering(ring: Ring, live: Workload | None, images: Images, *, shards: int, claim_size: str) -> int:
    """The rendering that the pods have, if it still says what the spec says; else the newest."""
    if live is not None and live.rendering in RENDERINGS:
        same = stateful_set(ring, images, replicas=shards, claim_size=claim_size, rendering=live.rendering)
        if same["spec"]["template"]["metadata"]["labels"][TEMPLATE_LABEL] == live.template:
            return live.rendering
    return RENDERING


def _annotated(body: Object, rendering: int, members: str) -> Object:
    annotations = {RENDERING_ANNOTATION: str(rendering), MEMBERS_ANNOTATION: members}
    return {**body, "metadata": {**body["metadata"], "annotations": annotations}}


def _gateway_images(seen: Observed, images: Images, shard_set: Child) -> Images:
    """Gateways follow the shards: they change their image when no shard has an old one left and all are ready."""
    live = seen.deployment
    if live is None or live.image == images.gateway:
        return images
    template = _template_label(shard_set)
    behind = [
        pod for pod in seen.pods.values() if pod.metadata.labels.get(TEMPLATE_LABEL) != template or not is_ready(pod)
    ]
    has_map = seen.map_seen is not None and seen.map_seen.map is not None
    return msgspec.structs.replace(images, gateway=live.image) if behind and has_map else images


def _template_of(wanted: list[Child]) -> str:
    return _template_label(next(child for child in wanted if child.resource == STATEFUL_SETS))


def _template_label(shard_set: Child) -> str:
    label: str = shard_set.body["spec"]["template"]["metadata"]["labels"][TEMPLATE_LABEL]
    return label


def _obstacle(seen: Observed, wanted: list[Child]) -> Obstacle | None:
    """What forbids any change."""
    ring, there = seen.ring, seen.map_seen
    if seen.map_error:
        return Obstacle("RingMapUnreadable", f"the RingMap {ring.name} cannot be understood: {seen.map_error}")
    foreign: list[str] = []
    for child in wanted:
        existing = seen.children.get(child.key)
        if existing is None:
            continue
        owner = next((owner for owner in existing.meta.owner_references if owner.controller), None)
        if owner is not None and owner.kind == SHARD_RINGS.kind and owner.name == ring.name and owner.uid != ring.uid:
            return Obstacle(
                "EarlierRingLeaves", f"{child.key} of the ShardRing that had this name is still being deleted"
            )
        ours = existing.meta.labels.get(MANAGER_LABEL) == MANAGER and existing.meta.labels.get(RING_LABEL) == ring.name
        if not ours or (owner is not None and owner.uid != ring.uid):
            foreign.append(child.key)
    if foreign:
        named = ", ".join(foreign[:FOREIGN_NAMED_MAX]) + (" and more" if len(foreign) > FOREIGN_NAMED_MAX else "")
        return Obstacle(
            "ForeignObject", f"{named} exists and is not this ring's; delete it, or name the ring otherwise"
        )
    secret = credential(ring).key
    if secret in seen.children and not seen.credential_whole:
        return Obstacle("CredentialEmpty", f"{secret} has no credential in it; delete it, and it is made anew")
    if there is not None and there.slots != ring.spec.slots:
        text = (
            f"the RingMap {ring.name}, kept with its volumes, has {there.slots} slots; make the ShardRing with as many"
        )
        return Obstacle("RingMapMismatch", text)
    if ring.status.epoch > 0 and (there is None or there.map is None):
        text = (
            f"the ring had a map (epoch {ring.status.epoch}) and it is gone; restore the RingMap {ring.name} "
            "from a backup: a new one would not know who owns what"
        )
        return Obstacle("RingMapLost", text)
    return None


def _repairs(seen: Observed, wanted: list[Child]) -> list[Action]:
    """What is missing is made, what is not as asked is applied again."""
    actions: list[Action] = []
    for child in wanted:
        existing = seen.children.get(child.key)
        once = child.key in {credential(seen.ring).key, ring_map(seen.ring).key}
        if existing is None:
            actions.append(Create(child, f"make {child.key}") if once else Apply(child, f"make {child.key}"))
        elif existing.meta.deletion_timestamp is not None:
            continue  # it comes back when it is gone
        elif not _as_asked(child, existing.meta.annotations.get(APPLIED_ANNOTATION, ""), existing.body):
            version, fewer = existing.meta.resource_version, _gives_pods_up(seen, child)
            actions.append(Apply(child, f"apply {child.key}", version, guarded=fewer))
    for name in unwanted_policies(seen.ring):
        there = seen.children.get(f"{NETWORK_POLICIES.kind} {name}")
        if there is not None and there.meta.labels.get(RING_LABEL) == seen.ring.name:
            actions.append(Delete(NETWORK_POLICIES, name, there.meta.uid, f"remove NetworkPolicy {name}"))
    return actions


def _gives_pods_up(seen: Observed, child: Child) -> bool:
    live = seen.stateful_set
    return child.resource == STATEFUL_SETS and live is not None and child.body["spec"]["replicas"] < live.replicas


def _left_behind(seen: Observed, shards: int) -> list[Action]:
    """Announcements of shards that are gone: a later shard of that name must not be taken for them."""
    kept = {shard_pod(seen.ring.name, number) for number in {*range(shards), *seen.pods}}
    return [
        Delete(LEASES, there.meta.name, there.meta.uid, f"remove Lease {there.meta.name}")
        for key, there in sorted(seen.children.items())
        if key.startswith(f"{LEASES.kind} ") and there.meta.name not in kept and there.meta.deletion_timestamp is None
    ]


def _as_asked(child: Child, applied: str, there: Object) -> bool:
    asked = child.body["metadata"]["annotations"][APPLIED_ANNOTATION]
    return bool(applied == asked) and same_where_asked(child.body, there)


def _map_changes(seen: Observed, decision: planning.Decision | None, in_place: tuple[ShardName, ...]) -> list[Action]:
    """The number of shards that is asked for, the map that follows, and which shards are replaced in place now."""
    there = seen.map_seen
    if there is None or decision is None:
        return []
    shards = seen.ring.spec.replicas
    if decision.new_map is not None:
        return [SwapMap(there.version, shards, decision.new_map, in_place, decision.sentence)]
    why = [f"the ring asks for {shards} shards"] if there.shards != shards else []
    if there.in_place != in_place:
        why.append(f"replaced in place: {', '.join(in_place) or 'none'}")
    return [SwapMap(there.version, shards, there.map, in_place, "; ".join(why))] if why else []


def _new_claim_template(seen: Observed, rolling: Roll, size: int) -> list[Action]:
    """A claim template cannot change in place: the StatefulSet is made anew around its pods, when all is calm.

    Its pods stay (orphaned, then adopted by their labels); the next step makes it with the size that is asked for.
    """
    live = seen.stateful_set
    if live is None or live.terminating or not live.claim_size or bytes_of(live.claim_size) == size:
        return []
    calm = not rolling.outdated and all(
        number in seen.pods and is_ready(seen.pods[number]) for number in range(live.replicas)
    )
    if not calm:
        return []
    name = next(key for key in seen.children if key.startswith(f"{STATEFUL_SETS.kind} ")).partition(" ")[2]
    return [Delete(STATEFUL_SETS, name, live.uid, "give new volumes the new size", orphan=True)]
