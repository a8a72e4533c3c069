"""A model of what Kubernetes does with a ring's objects, for tests of the plan: time is a number, nothing runs.

Promise: server-side apply, creation, compare-and-swap, deletion by uid and the StatefulSet's controller (`OnDelete`,
`Parallel`) as far as the plan can see them; a pod becomes ready if its image is good and its ring has a map.
Must not be done here: anything of the operator's (it is what is tested).
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import msgspec

from fleetlm_common.control import ShardEndpoint
from fleetlm_common.ids import ShardName, Term
from fleetlm_common.kubeapi import Object
from fleetlm_common.kubenames import LEASES, RING_MAPS
from fleetlm_common.ring import RingMap
from fleetlm_operator.memory import NO_MEMORY, Memory
from fleetlm_operator.observed import (
    Claim,
    ContainerState,
    ContainerStatus,
    Existing,
    MapSeen,
    Meta,
    Observed,
    Pod,
    PodCondition,
    PodSpec,
    PodStatus,
    ShardWord,
    Waiting,
    Workload,
    object_meta,
)
from fleetlm_operator.quantity import bytes_of
from fleetlm_operator.resources import DEPLOYMENTS, PODS, SECRETS, STATEFUL_SETS
from fleetlm_operator.ringplan import (
    MEMBERS_ANNOTATION,
    RENDERING_ANNOTATION,
    Action,
    Apply,
    Create,
    Defaults,
    Delete,
    Grow,
    Plan,
    SwapMap,
    plan,
)
from fleetlm_operator.ringspec import Ring, ring_from
from fleetlm_operator.verdict import Refusal, Verdict, judge, status_object
from fleetlm_operator.workloads import TEMPLATE_LABEL
from tests.test_operator.playedring import PlayedRing, PlayedShard

START = datetime(2026, 1, 1, tzinfo=UTC)
DEFAULTS = Defaults(registry="registry.example", version="1.0.0", namespace="fleetlm-system")
HANDOVER = timedelta(seconds=30)

CRASHING = ContainerStatus(
    name="shard", restart_count=5, state=ContainerState(waiting=Waiting(reason="CrashLoopBackOff"))
)


def ring_object(spec: Object | None = None, *, uid: str = "ring-uid", status: Object | None = None) -> Object:
    """A ShardRing as the API server shows it."""
    metadata = {"name": "demo", "namespace": "chat", "uid": uid, "generation": 1}
    return {"metadata": metadata, "spec": spec or {}, "status": status or {}}


class ModelCluster:
    """One namespace with one ring.

    Args:
        spec: the ShardRing's spec as a person writes it.
        bad: tells an image that never becomes ready.
    """

    def __init__(self, spec: Object | None = None, *, bad: Callable[[str], bool] = lambda _: False) -> None:
        self.ring_object = ring_object(spec)
        self.bad = bad
        self.defaults = DEFAULTS
        self.now = START
        self.children: dict[str, Object] = {}
        self.pods: dict[int, Pod] = {}
        self.claims: dict[int, Claim] = {}
        self.volumes: dict[int, str] = {}
        self.crashed: dict[int, ContainerStatus] = {}
        self.words: dict[int, ShardWord] = {}
        self.cordoned_nodes: set[str] = set()
        """Each shard begins on a node of its own, `node0` and so on; later pods avoid those that are cordoned."""
        self.gateways_away = 0
        self.gateways_left = 0
        """Of an earlier template, and still there."""
        self.short_since: datetime | None = None
        self.map: RingMap | None = None
        self.map_spec: tuple[str, int, int] = ("", 0, 0)
        self.in_place: tuple[ShardName, ...] = ()
        self.deleted: list[str] = []
        self.refuses: Callable[[Action], str] = lambda _: ""
        self.verdict: Verdict | None = None
        self.plan: Plan | None = None
        self._serial = 0
        self.memory: Memory = NO_MEMORY
        self.played = PlayedRing(shards=0, slots=self.ring.spec.slots)
        self.announced: dict[int, ShardEndpoint] = {}
        """As the Leases have it: a word outlives pod and volume."""

    @property
    def ring(self) -> Ring:
        """The ring as it is now."""
        return ring_from(self.ring_object)

    def edit(self, **spec: object) -> None:
        """What a person does: change the spec."""
        self.ring_object["spec"] |= spec
        self.ring_object["metadata"]["generation"] += 1

    def observe(self) -> Observed:
        """What the operator would see."""
        shard_set = self.children.get(f"{STATEFUL_SETS.kind} demo-shard")
        gateways = self.children.get(f"{DEPLOYMENTS.kind} demo-gateway")
        seen_map = None
        if f"{RING_MAPS.kind} demo" in self.children:
            uid, slots, shards = self.map_spec
            seen_map = MapSeen(
                ring_uid=uid,
                slots=slots,
                shards=shards,
                map=self.map,
                version=self._map_version(),
                in_place=self.in_place,
            )
        return Observed(
            ring=self.ring,
            now=self.now,
            map_seen=seen_map,
            stateful_set=None if shard_set is None else _workload(shard_set),
            deployment=None if gateways is None else self._gateways(gateways),
            pods=dict(sorted(self.pods.items())),
            claims=dict(sorted(self.claims.items())),
            endpoints={
                said.name: said
                for number, said in sorted(self.announced.items())
                if f"{LEASES.kind} demo-shard-{number}" in self.children
            },
            words=dict(sorted(self.words.items())),
            children={key: Existing(object_meta(body), body) for key, body in self.children.items()},
            credential_whole=f"{SECRETS.kind} demo-credential" in self.children,
            cordoned_nodes=frozenset(self.cordoned_nodes),
        )

    def _gateways(self, body: Object) -> Workload:
        whole = _workload(body)
        there, pods = whole.replicas - self.gateways_away, whole.replicas + self.gateways_left
        return msgspec.structs.replace(whole, ready=there, available=there, short_since=self.short_since, pods=pods)

    def lose_gateways(self, count: int) -> None:
        """So many gateways are not available from now on; their Deployment has as many pods as before."""
        self.gateways_away, self.short_since = count, self.now if count else None

    def step(self) -> tuple[Action, ...]:
        """One step of the operator; returns what it did. Then Kubernetes does its part."""
        seen = self.observe()
        planned = plan(seen, self.defaults, self.memory, now_s=(self.now - START).total_seconds())
        refusals: list[Refusal] = []
        for action in planned.actions:
            words = self.refuses(action)
            if words:
                refusals.append(Refusal(action.why, words, storage=isinstance(action, Grow)))
            else:
                self._do(action)
        if planned.decision is not None:
            self.memory = planned.decision.memory
        self.plan, self.verdict = planned, judge(seen, planned, tuple(refusals))
        self.ring_object["status"] = status_object(seen, planned, self.verdict)
        self.now += timedelta(seconds=1)
        self._controllers()
        return planned.actions

    def settle(self, steps: int = 60) -> None:
        """Steps until nothing is done any more."""
        for _ in range(steps):
            if not self.step():
                self.step()
                return
        raise AssertionError(f"still busy after {steps} steps: {self.verdict}")

    def said(self, kind: str) -> tuple[str, str]:
        """Status and reason of a condition."""
        assert self.verdict is not None
        return self.verdict.conditions[kind].status, self.verdict.conditions[kind].reason

    def at_rest(self) -> bool:
        """Whether the operator may take its time until the next look."""
        assert self.verdict is not None
        return self.verdict.settled

    def break_pod(self, number: int, *, container: ContainerStatus = CRASHING) -> None:
        """It is not ready, though its image is good: its container fails, or is as told."""
        self.crashed[number] = container
        self._refresh()

    def mend_pod(self, number: int) -> None:
        """It serves again, in its pod."""
        del self.crashed[number]
        self._refresh()

    def evict(self, number: int) -> None:
        """A drain asks a pod to end: its shard serves on until others have its slots, or for HANDOVER at the most."""
        pod = self.pods[number]
        going = msgspec.structs.replace(pod.metadata, deletion_timestamp=self.now)
        self.pods[number] = msgspec.structs.replace(pod, metadata=going)

    def images(self) -> list[str]:
        """The image of each pod, by ordinal."""
        return [pod.metadata.annotations["image"] for _, pod in sorted(self.pods.items())]

    def _do(self, action: Action) -> None:
        match action:
            case Apply(child) | Create(child):
                self._put(child.key, child.body, once=isinstance(action, Create))
            case SwapMap(version, shards, new, in_place):
                assert version == self._map_version(), "a swap from an old version"
                assert new is None or new.epoch == (self.map.epoch + 1 if self.map else 1) or new == self.map
                if new is not None and new != self.map:
                    self.played.change(new)
                self.map, self.map_spec, self.in_place = new, (*self.map_spec[:2], shards), in_place
            case Delete(resource, name, uid):
                if resource in {PODS, STATEFUL_SETS}:
                    self.deleted.append(name)
                key = f"{resource.kind} {name}"
                if resource == LEASES:
                    self.announced.pop(int(name.rpartition("-")[2]), None)
                if key in self.children:
                    assert self.children[key]["metadata"]["uid"] == uid
                    del self.children[key]
                self.pods = {number: pod for number, pod in self.pods.items() if pod.metadata.uid != uid}
                self.crashed = {number: how for number, how in self.crashed.items() if number in self.pods}
            case Grow(name, size):
                number = next(number for number, claim in self.claims.items() if claim.name == name)
                grown = bytes_of(size)
                self.claims[number] = msgspec.structs.replace(
                    self.claims[number], requested_bytes=grown, capacity_bytes=grown
                )

    def _put(self, key: str, body: Object, *, once: bool) -> None:
        self._serial += 1
        before = self.children.get(key)
        if before is None and key == f"{RING_MAPS.kind} demo":
            self.map_spec = (self.ring.uid, self.ring.spec.slots, self.ring.spec.replicas)
        if once and before is not None:
            return
        uid = before["metadata"]["uid"] if before else f"uid-{self._serial}"
        metadata = {**body["metadata"], "uid": uid, "resourceVersion": str(self._serial)}
        self.children[key] = {**body, "metadata": metadata}

    def _map_version(self) -> str:
        return f"{self.map.epoch if self.map else 0}/{self.map_spec[2]}/{','.join(self.in_place)}"

    def _controllers(self) -> None:
        """The StatefulSet's controller, kubelets and shards."""
        shard_set = self.children.get(f"{STATEFUL_SETS.kind} demo-shard")
        owners = set() if self.map is None else {found.owner for found in self.map.ranges}
        self.pods = {
            number: pod
            for number, pod in self.pods.items()
            if (since := pod.metadata.deletion_timestamp) is None
            or (f"shard-{number}" in owners and self.now - since < HANDOVER)
        }
        if shard_set is not None:
            template = shard_set["spec"]["template"]
            for number in range(shard_set["spec"]["replicas"]):
                if number not in self.pods:
                    self.pods[number] = self._new_pod(number, template)
                    size = shard_set["spec"]["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"]
                    self.claims.setdefault(number, _claim(number, bytes_of(size)))
            for number in [number for number in self.pods if number >= shard_set["spec"]["replicas"]]:
                self._give_up(number, shard_set)
        self._refresh()
        self._play_shards()
        self._refresh()

    def _give_up(self, number: int, shard_set: Object) -> None:
        """The StatefulSet has fewer pods."""
        name = ShardName(f"shard-{number}")
        assert self.map is None or self.map.member(name) is None, "a member's pod is given up"
        del self.pods[number]
        if shard_set["spec"]["persistentVolumeClaimRetentionPolicy"]["whenScaled"] == "Delete":
            del self.claims[number]
            self.volumes[number] = f"{self._volume(number)}-anew"
            self.played.shards.pop(name, None)

    def _play_shards(self) -> None:
        """Each shard that runs sees the map, gets on with its moves, and says so."""
        self.played.map = self.map
        running = {ShardName(f"shard-{number}") for number, pod in self.pods.items() if self._runs(number, pod)}
        for number in self.pods:
            name = ShardName(f"shard-{number}")
            self.played.shards.setdefault(name, PlayedShard(self.played, name))
        for name, shard in self.played.shards.items():
            if shard.up != (name in running):
                (shard.stop if shard.up else shard.start)()
            shard.act()
        for number, pod in self.pods.items():
            name = ShardName(f"shard-{number}")
            bare = ShardEndpoint(name, "", Term(1), "", 4100, "")
            said = self.played.announcements.get(name, bare)
            address = pod.status.pod_ip
            self.announced[number] = msgspec.structs.replace(said, volume_id=self._volume(number), host=address)

    def _runs(self, number: int, pod: Pod) -> bool:
        lost = self.map is not None and any(
            member.name == f"shard-{number}" and member.volume_id != self._volume(number) for member in self.map.members
        )
        return not (self.bad(pod.metadata.annotations["image"]) or number in self.crashed or lost)

    def _new_pod(self, number: int, template: Object) -> Pod:
        self._serial += 1
        meta = Meta(
            name=f"demo-shard-{number}",
            uid=f"pod-{self._serial}",
            labels=template["metadata"]["labels"],
            annotations={"image": template["spec"]["containers"][0]["image"]},
            creation_timestamp=self.now,
        )
        name = ShardName(f"shard-{number}")
        if name in self.played.shards and self.played.shards[name].up:
            self.played.shards[name].stop()
        address = f"10.0.{self._serial // 250}.{self._serial % 250}"
        node = next(name for name in (f"node{number}", "spare") if name not in self.cordoned_nodes)
        return Pod(metadata=meta, spec=PodSpec(node_name=node), status=PodStatus(pod_ip=address))

    def _refresh(self) -> None:
        self.pods = {number: self._with_status(number, pod) for number, pod in self.pods.items()}

    def _with_status(self, number: int, pod: Pod) -> Pod:
        bad_image = self.bad(pod.metadata.annotations["image"])
        member = self.map is not None and self.map.member(ShardName(f"shard-{number}")) is not None
        ready = member and self._runs(number, pod)
        before = next((each for each in pod.status.conditions if each.type == "Ready"), None)
        status = "True" if ready else "False"
        since = before.last_transition_time if before is not None and before.status == status else self.now
        container = ContainerStatus(name="shard")
        if bad_image:
            container = ContainerStatus(
                name="shard", state=ContainerState(waiting=Waiting(reason="ImagePullBackOff", message="no such image"))
            )
        elif number in self.crashed:
            container = self.crashed[number]
        conditions = (PodCondition(type="Ready", status=status, last_transition_time=since),)
        return msgspec.structs.replace(
            pod,
            status=PodStatus(
                phase="Running", pod_ip=pod.status.pod_ip, conditions=conditions, container_statuses=(container,)
            ),
        )

    def _volume(self, number: int) -> str:
        return self.volumes.setdefault(number, f"volume-{number}")


def _workload(body: Object) -> Workload:
    claims = body["spec"].get("volumeClaimTemplates")
    replicas: int = body["spec"]["replicas"]
    members: str = body["metadata"].get("annotations", {}).get(MEMBERS_ANNOTATION, "")
    return Workload(
        uid=body["metadata"]["uid"],
        replicas=replicas,
        settled=True,
        template=body["spec"]["template"]["metadata"]["labels"][TEMPLATE_LABEL],
        rendering=int(body["metadata"].get("annotations", {}).get(RENDERING_ANNOTATION, "0")),
        members=frozenset(int(number) for number in members.split(",") if number),
        image=body["spec"]["template"]["spec"]["containers"][0]["image"],
        claim_size=claims[0]["spec"]["resources"]["requests"]["storage"] if claims else "",
        ready=replicas,
        updated=replicas,
        pods=replicas,
        available=replicas,
    )


def _claim(number: int, size: int) -> Claim:
    return Claim(name=f"data-demo-shard-{number}", requested_bytes=size, capacity_bytes=size)
