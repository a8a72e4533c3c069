"""The border to the API server: observe one ring, carry out one action.

Promise: an observation is made of live reads only, never of a watch's cache, so that what is decided about a pod rests
on the pod as it is; what an object of the API server does not say is not guessed. Must not be done here: deciding.
"""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Final

import msgspec

from fleetlm_common.control import RingSpec, ShardEndpoint
from fleetlm_common.ids import ShardName
from fleetlm_common.kubeapi import ApiError, ApiExists, ApiNotFound, ApiRefused, KubeApi, Object
from fleetlm_common.kubemap import read_ring_map, ring_map_spec
from fleetlm_common.kubenames import (
    COMPONENT_LABEL,
    CREDENTIAL_KEY,
    DATA_CLAIM,
    ENDPOINT_ANNOTATION,
    LEASES,
    MANAGER,
    RING_LABEL,
    RING_MAPS,
    SHARD_RINGS,
    Resource,
    credential_secret,
    gateway_workload,
    selector,
    shard_service,
    shard_workload,
)
from fleetlm_common.logs import Logger
from fleetlm_operator.observed import (
    Claim,
    Existing,
    MapSeen,
    Observed,
    Pod,
    ShardWord,
    Workload,
    object_meta,
    pod_from,
)
from fleetlm_operator.quantity import bytes_of
from fleetlm_operator.resources import (
    CLAIMS,
    DEPLOYMENTS,
    DISRUPTION_BUDGETS,
    NETWORK_POLICIES,
    NODES,
    PODS,
    ROLE_BINDINGS,
    ROLES,
    SECRETS,
    SERVICE_ACCOUNTS,
    SERVICES,
    STATEFUL_SETS,
)
from fleetlm_operator.ringplan import (
    MEMBERS_ANNOTATION,
    RENDERING_ANNOTATION,
    Action,
    Apply,
    Create,
    Delete,
    Grow,
    SwapMap,
)
from fleetlm_operator.ringspec import Ring, ring_from
from fleetlm_operator.shardwords import ShardWords
from fleetlm_operator.workloads import TEMPLATE_LABEL

READS_MAX: Final = 8
"""Reads of one observation at once: polite to the API server, and a ring needs some twenty."""
CORDONED: Final = "spec.unschedulable=true"
"""Field selector: the server leaves out the nodes that take pods, which is nearly all of them nearly always."""
FORBIDDEN: Final = 403
"""HTTP status of what RBAC does not allow."""
NODES_AGAIN: Final = timedelta(minutes=5)
"""Between two tries to look at nodes without the right; it may be granted while the operator runs."""


class KubeWorld:
    """One API server.

    Args:
        api: the connection.
        now: the time, for ages of pods.
        new_credential: makes a secret that nobody can guess.
        words: asks shards how they are.
        log: where it is said that nodes cannot be looked at.
    """

    def __init__(
        self,
        api: KubeApi,
        *,
        now: Callable[[], datetime],
        new_credential: Callable[[], str],
        words: ShardWords,
        log: Logger,
    ) -> None:
        self._api = api
        self._log = log
        self._nodes_refused: datetime | None = None
        self._words = words
        self._now = now
        self._new_credential = new_credential

    async def observe(self, namespace: str, name: str) -> Observed | None:
        """Everything of one ring; None if there is no such ring.

        Raises:
            ApiError: the API server did not answer, or does not let the operator read.
            ValueError: an object does not look as it must.
        """
        found = await self._api.get(SHARD_RINGS, namespace, name)
        if found is None:
            return None
        ring = ring_from(found)
        limit = asyncio.Semaphore(READS_MAX)

        async def get(resource: Resource, child: str) -> tuple[str, Object | None]:
            async with limit:
                return f"{resource.kind} {child}", await self._api.get(resource, namespace, child)

        async def listed(resource: Resource, labels: str) -> list[Object]:
            async with limit:
                return (await self._api.list(resource, namespace, labels=labels)).items

        async def shards() -> tuple[dict[int, Pod], dict[int, ShardWord]]:
            found = _pods(name, await listed(PODS, shard_labels))
            return found, await self._words.ask(found)

        shard_labels = ",".join(f"{key}={value}" for key, value in selector(name, "shard").items())
        own_labels = f"{RING_LABEL}={name},{COMPONENT_LABEL}=shard"
        try:
            async with asyncio.TaskGroup() as tasks:
                gets = [tasks.create_task(get(resource, child)) for resource, child in _singles(name)]
                pods = tasks.create_task(shards())
                claims = tasks.create_task(listed(CLAIMS, shard_labels))
                leases = tasks.create_task(listed(LEASES, own_labels))
                nodes = tasks.create_task(self._cordoned_nodes())
        except* ApiError as failures:
            raise _first(failures) from failures
        singles = {key: body for key, body in (task.result() for task in gets) if body is not None}
        seen = self._assembled(ring, singles, shards=pods.result(), claims=claims.result(), leases=leases.result())
        return msgspec.structs.replace(seen, cordoned_nodes=nodes.result())

    async def _cordoned_nodes(self) -> frozenset[str]:
        """Names of the nodes that take no pods; none without the right to list nodes, which is said once."""
        now = self._now()
        if self._nodes_refused is not None and now - self._nodes_refused < NODES_AGAIN:
            return frozenset()
        try:
            found = (await self._api.list(NODES, None, fields=CORDONED, metadata_only=True)).items
        except ApiRefused as error:
            if error.status != FORBIDDEN:
                raise
            if self._nodes_refused is None:
                self._log.event("nodes_unseen", why="no right to list nodes: cordoned ones count like all others")
            self._nodes_refused = now
            return frozenset()
        self._nodes_refused = None
        return frozenset(node["metadata"]["name"] for node in found)

    async def observe_moves(self, seen: Observed) -> Observed:
        """What of a ring changes while slots move, afresh: the map, the pods, the announcements.

        Raises:
            ApiError: the API server did not answer.
        """
        ring = seen.ring
        labels = ",".join(f"{key}={value}" for key, value in selector(ring.name, "shard").items())
        own_labels = f"{RING_LABEL}={ring.name},{COMPONENT_LABEL}=shard"
        try:
            async with asyncio.TaskGroup() as tasks:
                found = tasks.create_task(self._api.get(RING_MAPS, ring.namespace, ring.name))
                pods = tasks.create_task(self._api.list(PODS, ring.namespace, labels=labels))
                leases = tasks.create_task(self._api.list(LEASES, ring.namespace, labels=own_labels))
        except* ApiError as failures:
            raise _first(failures) from failures
        map_seen, map_error = _map_from(found.result())
        return msgspec.structs.replace(
            seen,
            now=self._now(),
            map_seen=map_seen,
            map_error=map_error,
            pods=_pods(ring.name, pods.result().items),
            endpoints=_endpoints(ring.name, leases.result().items),
        )

    async def observe_orphan(self, namespace: str, name: str) -> Observed | None:
        """A ring whose ShardRing is gone while writers wait for a move to end; None if nobody does.

        It is as one that is paused: what is sealed is ended, and nothing else is done.
        """
        map_seen, _ = _map_from(await self._api.get(RING_MAPS, namespace, name))
        moves = () if map_seen is None or map_seen.map is None else map_seen.map.moves
        if map_seen is None or all(move.state != "Sealing" for move in moves):
            return None
        spec = {"replicas": map_seen.shards, "slots": map_seen.slots, "paused": True}
        ring = ring_from({"metadata": {"name": name, "namespace": namespace, "uid": ""}, "spec": spec})
        nothing = Observed(
            ring=ring,
            now=self._now(),
            map_seen=map_seen,
            stateful_set=None,
            deployment=None,
            pods={},
            claims={},
            endpoints={},
            children={},
            words={},
            credential_whole=True,
        )
        return await self.observe_moves(nothing)

    def _assembled(
        self,
        ring: Ring,
        singles: Mapping[str, Object],
        *,
        shards: tuple[dict[int, Pod], dict[int, ShardWord]],
        claims: Iterable[Object],
        leases: Iterable[Object],
    ) -> Observed:
        map_seen, map_error = _map_from(singles.get(f"{RING_MAPS.kind} {ring.name}"))
        secret = singles.get(f"{SECRETS.kind} {credential_secret(ring.name)}")
        leases = list(leases)
        children = {
            **{key: Existing(object_meta(body), body) for key, body in singles.items()},
            **{f"{LEASES.kind} {body['metadata']['name']}": Existing(object_meta(body), body) for body in leases},
        }
        return Observed(
            ring=ring,
            now=self._now(),
            map_seen=map_seen,
            map_error=map_error,
            stateful_set=_shard_set(singles.get(f"{STATEFUL_SETS.kind} {shard_workload(ring.name)}")),
            deployment=_gateways(singles.get(f"{DEPLOYMENTS.kind} {gateway_workload(ring.name)}")),
            pods=shards[0],
            words=shards[1],
            claims=_claims(ring.name, claims),
            endpoints=_endpoints(ring.name, leases),
            children=children,
            credential_whole=bool(secret is not None and secret.get("data", {}).get(CREDENTIAL_KEY)),
        )

    async def act(self, ring: Ring, action: Action) -> bool:
        """Carry out one action.

        Returns:
            Whether anything changed.

        Raises:
            ApiError: it was not done, or (`ApiUnavailable`) perhaps.
        """
        namespace = ring.namespace
        match action:
            case Apply(child):
                body = child.body
                if action.guarded:
                    body = {**body, "metadata": {**body["metadata"], "resourceVersion": action.version}}
                after = await self._api.apply(child.resource, namespace, body, manager=MANAGER)
                return object_meta(after).resource_version != action.version
            case Create(child):
                await self._create(ring, child.resource, child.body)
            case SwapMap():
                await self._swap(ring, action)
            case Delete(resource, name, uid):
                how = "Orphan" if action.orphan else "Background"
                with suppress(ApiNotFound):
                    await self._api.delete(resource, namespace, name, uid=uid, propagation=how)
            case Grow(name, size):
                asked: Object = {"spec": {"resources": {"requests": {"storage": size}}}}
                await self._api.merge(CLAIMS, namespace, name, asked, manager=MANAGER)
        return True

    async def write_status(self, ring: Ring, status: Object) -> None:
        """Replace the ring's status.

        Raises:
            ApiError: it was not done, or perhaps.
        """
        body: Object = {
            "apiVersion": SHARD_RINGS.api,
            "kind": SHARD_RINGS.kind,
            # By uid: a status never lands on a later ring of the same name.
            "metadata": {"name": ring.name, "namespace": ring.namespace, "uid": ring.uid},
            "status": status,
        }
        await self._api.apply(SHARD_RINGS, ring.namespace, body, manager=MANAGER, subresource="status")

    async def _create(self, ring: Ring, resource: Resource, body: Object) -> None:
        """Make what is written once, then apply owner and digest, so that applies own those fields and may drop them.

        At once: a ring that is deleted or paused before its next step would leave an ownerless Secret for ever.
        """
        metadata = {key: body["metadata"][key] for key in ("name", "namespace", "labels")}
        made: Object = {"apiVersion": body["apiVersion"], "kind": body["kind"], "metadata": metadata}
        if resource == SECRETS:
            secret = b64encode(self._new_credential().encode()).decode()
            made |= {"type": "Opaque", "data": {CREDENTIAL_KEY: secret}}
        else:
            spec = RingSpec(uid=ring.uid, slots=ring.spec.slots, shards=ring.spec.replicas)
            made["spec"] = ring_map_spec(spec, None)
        try:
            await self._api.create(resource, ring.namespace, made)
        except ApiExists:
            return  # somebody else's, or another operator's: the next step looks whose
        await self._api.apply(resource, ring.namespace, body, manager=MANAGER)

    async def _swap(self, ring: Ring, swap: SwapMap) -> None:
        """Compare-and-swap by resourceVersion; uid and slots never change."""
        # A merge keeps what is not named: that nobody is replaced and nothing moves must be said.
        spec: Object = {"shards": swap.shards, "inPlace": list(swap.in_place) or None}
        if swap.new is not None:
            written = ring_map_spec(RingSpec(swap.new.uid, swap.new.slots, swap.shards), swap.new)["map"]
            spec["map"] = {"moves": None, **written}
        body: Object = {"metadata": {"resourceVersion": swap.version}, "spec": spec}
        await self._api.merge(RING_MAPS, ring.namespace, ring.name, body, manager=MANAGER)


def _first(failures: BaseExceptionGroup[ApiError]) -> ApiError:
    """The first error of a group; the others are the same trouble."""
    found = failures.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found


def _singles(ring: str) -> list[tuple[Resource, str]]:
    """Every child that has a name of its own (leases are found by label, there may be a hundred)."""
    both = [
        (resource, f"{ring}-{component}")
        for component in ("shard", "gateway")
        for resource in (DISRUPTION_BUDGETS, SERVICE_ACCOUNTS, ROLES, ROLE_BINDINGS, NETWORK_POLICIES)
    ]
    return [
        *both,
        (RING_MAPS, ring),
        (SECRETS, credential_secret(ring)),
        (SERVICES, shard_service(ring)),
        (SERVICES, gateway_workload(ring)),
        (STATEFUL_SETS, shard_workload(ring)),
        (DEPLOYMENTS, gateway_workload(ring)),
    ]


def _map_from(found: Object | None) -> tuple[MapSeen | None, str]:
    """The RingMap, or why it cannot be understood."""
    if found is None:
        return None, ""
    try:
        spec, ring_map = read_ring_map(found)
    except (ValueError, KeyError) as error:
        return None, str(error)
    version = object_meta(found).resource_version
    seen = MapSeen(
        ring_uid=spec.uid,
        slots=spec.slots,
        shards=spec.shards,
        map=ring_map,
        version=version,
        in_place=spec.in_place,
    )
    return seen, ""


def _pods(ring: str, found: Iterable[Object]) -> dict[int, Pod]:
    """The shards' pods by ordinal, in order."""
    prefix = shard_workload(ring) + "-"
    pods = [pod_from(body) for body in found]
    numbered = {
        int(pod.metadata.name.removeprefix(prefix)): pod
        for pod in pods
        if pod.metadata.name.startswith(prefix) and pod.metadata.name.removeprefix(prefix).isdecimal()
    }
    return dict(sorted(numbered.items()))


def _claims(ring: str, found: Iterable[Object]) -> dict[int, Claim]:
    """The shards' claims by ordinal; claims of shards that left the ring too."""
    prefix = f"{DATA_CLAIM}-{shard_workload(ring)}-"
    claims: dict[int, Claim] = {}
    for body in found:
        name = body["metadata"]["name"]
        number = name.removeprefix(prefix)
        if not name.startswith(prefix) or not number.isdecimal():
            continue
        status = body.get("status", {})
        claims[int(number)] = Claim(
            name=name,
            requested_bytes=_size(body["spec"]["resources"]["requests"]["storage"]),
            capacity_bytes=_size(status.get("capacity", {}).get("storage", "0")),
        )
    return dict(sorted(claims.items()))


def _size(quantity: str) -> int:
    """Bytes; 0 for what some provisioner writes and nobody can read, which then counts as unknown."""
    try:
        return bytes_of(quantity)
    except ValueError:
        return 0


def _endpoints(ring: str, leases: Iterable[Object]) -> dict[ShardName, ShardEndpoint]:
    """What shards announced, each in its own Lease; an annotation that is no announcement says nothing."""
    found: dict[ShardName, ShardEndpoint] = {}
    for lease in leases:
        text = lease["metadata"].get("annotations", {}).get(ENDPOINT_ANNOTATION)
        if text is None:
            continue
        with suppress(msgspec.ValidationError, msgspec.DecodeError):
            endpoint = msgspec.json.decode(text, type=ShardEndpoint)
            if lease["metadata"]["name"] == f"{ring}-{endpoint.name}":
                found[endpoint.name] = endpoint
    return found


def _shard_set(found: Object | None) -> Workload | None:
    if found is None:
        return None
    meta, spec, status = object_meta(found), found["spec"], found.get("status", {})
    claims = spec.get("volumeClaimTemplates") or [{}]
    rendering = meta.annotations.get(RENDERING_ANNOTATION, "")
    members = meta.annotations.get(MEMBERS_ANNOTATION, "").split(",")
    return Workload(
        uid=meta.uid,
        members=frozenset(int(number) for number in members if number.isdecimal()),
        replicas=spec.get("replicas", 1),
        settled=status.get("observedGeneration", 0) >= meta.generation,
        template=spec["template"]["metadata"].get("labels", {}).get(TEMPLATE_LABEL, ""),
        rendering=int(rendering) if rendering.isdecimal() else 0,
        image=spec["template"]["spec"]["containers"][0].get("image", ""),
        claim_size=claims[0].get("spec", {}).get("resources", {}).get("requests", {}).get("storage", ""),
        ready=status.get("readyReplicas", 0),
        terminating=meta.deletion_timestamp is not None,
    )


def _gateways(found: Object | None) -> Workload | None:
    if found is None:
        return None
    meta, spec, status = object_meta(found), found["spec"], found.get("status", {})
    conditions = {condition["type"]: condition for condition in status.get("conditions", [])}
    progressing, available = conditions.get("Progressing", {}), conditions.get("Available", {})
    late = progressing.get("reason") == "ProgressDeadlineExceeded"
    short = available.get("lastTransitionTime") if available.get("status") == "False" else None
    return Workload(
        uid=meta.uid,
        replicas=spec.get("replicas", 1),
        settled=status.get("observedGeneration", 0) >= meta.generation,
        template=spec["template"]["metadata"].get("labels", {}).get(TEMPLATE_LABEL, ""),
        rendering=0,
        image=spec["template"]["spec"]["containers"][0].get("image", ""),
        ready=status.get("readyReplicas", 0),
        updated=status.get("updatedReplicas", 0),
        pods=status.get("replicas", 0),
        available=status.get("availableReplicas", 0),
        stuck=progressing.get("message", "") if late else "",
        short_since=None if short is None else datetime.fromisoformat(short),
        terminating=meta.deletion_timestamp is not None,
    )
