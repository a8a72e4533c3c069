"""How many pods a ring needs now, which shards are to hand their slots over, and what a plan of moves is shown. Pure.

    asked for, no member yet   it has a pod; it counts as announced once that very pod has spoken
    member, not asked for      keeps its pod until the map says that it left, and so until it has handed everything over
    on its way out             `kubectl drain`, `kubectl delete pod`: others get its slots while it still serves

Promise: a pod, and with it a volume, is given up only by a map in which its shard is no member; and a shard gets slots
only when the StatefulSet is known to keep it, by what was written there after it joined: who gives pods up by an older
look is refused by the version of the StatefulSet. Must not be done here: planning moves (`planning.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from fleetlm_common.control import Forgotten, Pin, RingSpec, ShardEndpoint, View
from fleetlm_common.ids import ShardName
from fleetlm_common.kubenames import ordinal_of
from fleetlm_common.ring import RingMap
from fleetlm_operator.observed import Observed, Pod, condition_of, is_ready
from fleetlm_operator.planning import serves_nothing
from fleetlm_operator.workloads import TEMPLATE_LABEL


def map_of(seen: Observed) -> RingMap | None:
    """The ring map, if there is one."""
    return None if seen.map_seen is None else seen.map_seen.map


def pods_needed(seen: Observed) -> int:
    """Pods that the ring needs: as many as are asked for, and one for each member that has not left yet."""
    ring_map = map_of(seen)
    members = () if ring_map is None else ring_map.members
    return max([seen.ring.spec.replicas, *(ordinal_of(member.name) + 1 for member in members)])


def members_text(seen: Observed) -> str:
    """The members' ordinals, as the StatefulSet carries them; its change is what an older look fails at."""
    ring_map = map_of(seen)
    numbers = [] if ring_map is None else sorted(ordinal_of(member.name) for member in ring_map.members)
    return ",".join(map(str, numbers))


def view_of(seen: Observed, cordoned: Collection[ShardName] = ()) -> View:
    """The ring as the controller over any control plane sees it; ready is what Kubernetes says of the pods now."""
    assert seen.map_seen is not None
    shards = {name: shown for name, said in seen.endpoints.items() if (shown := _shown(seen, said)) is not None}
    spec = RingSpec(
        uid=seen.map_seen.ring_uid,
        slots=seen.map_seen.slots,
        shards=seen.ring.spec.replicas,
        cordoned=tuple(cordoned),
        pins=tuple(Pin(pin.first, pin.last, pin.shard) for pin in seen.ring.spec.pins),
        given_up=seen.ring.spec.given_up_volumes,
        forgotten=tuple(Forgotten(each.shard, each.volume) for each in seen.ring.spec.forgotten_volumes),
    )
    return View(
        spec=spec,
        map=seen.map_seen.map,
        shards=shards,
        avoided=_on_cordoned_nodes(seen),
        alive=tuple(_name(number) for number, pod in seen.pods.items() if _serves(pod)),
    )


def _on_cordoned_nodes(seen: Observed) -> tuple[ShardName, ...]:
    """Shards whose node takes no pods and is likely to be drained: what moves to them would move again."""
    return tuple(_name(number) for number, pod in seen.pods.items() if pod.spec.node_name in seen.cordoned_nodes)


def _shown(seen: Observed, said: ShardEndpoint) -> ShardEndpoint | None:
    """A shard's announcement as far as it counts.

    One that is no member is its pod: an announcement outlives pod and volume, and would bind the ring to what is gone.
    """
    number, ring_map = ordinal_of(said.name), map_of(seen)
    pod = seen.pods.get(number)
    member = None if ring_map is None else ring_map.member(said.name)
    if member is None:
        spoke = pod is not None and not is_going(pod) and bool(said.host) and pod.status.pod_ip == said.host
        if not spoke or not _kept(seen, number):
            return None
    owns = ring_map is not None and any(found.owner == said.name for found in ring_map.ranges)
    return msgspec.structs.replace(said, ready=pod is not None and _serves(pod) and (owns or _known(seen, number)))


def _kept(seen: Observed, number: int) -> bool:
    """Whether the StatefulSet's controller knows that it is to keep this pod."""
    live = seen.stateful_set
    return live is not None and not live.terminating and live.settled and number < live.replicas


def _known(seen: Observed, number: int) -> bool:
    """Whether that was written after the shard had joined."""
    return _kept(seen, number) and seen.stateful_set is not None and number in seen.stateful_set.members


def _serves(pod: Pod) -> bool:
    """Ready, also on its way out: it serves until its process ends."""
    condition = condition_of(pod, "Ready")
    return condition is not None and condition.status == "True"


def is_going(pod: Pod) -> bool:
    """Whether it is on its way out."""
    return pod.metadata.deletion_timestamp is not None


def going(seen: Observed, template: str) -> list[int]:
    """Shards that are on their way out and wait for their slots to be taken.

    Not those that the operator replaces in place: that is over sooner.
    """
    in_place = seen.ring.spec.update.strategy == "InPlace"
    return [
        number
        for number, pod in seen.pods.items()
        if is_going(pod) and not (in_place and pod.metadata.labels.get(TEMPLATE_LABEL) != template)
    ]


def cordons(seen: Observed, numbers: Sequence[int]) -> tuple[ShardName, ...]:
    """Shards that may own nothing: those that people cordoned, and `numbers` unless nobody ready would be left.

    What people cordoned counts whether others are ready or not: while the last of these restarts, slots must not move
    back.
    """
    asked = _cordoned_by_people(seen)
    own = tuple(name for name in map(_name, numbers) if name not in asked)
    left = any(_is_ready(seen, number) and _name(number) not in (*asked, *own) for number in _staying(seen))
    return (*asked, *own) if left else asked


def cordons_ignored(seen: Observed) -> bool:
    """Whether people cordoned every member that is asked for: somebody must own the slots, so none of it counts."""
    staying = _staying(seen)
    return bool(staying) and all(_name(number) in seen.ring.spec.cordoned for number in staying)


def _cordoned_by_people(seen: Observed) -> tuple[ShardName, ...]:
    """Shards that people want to own nothing, as far as that counts."""
    return () if cordons_ignored(seen) else seen.ring.spec.cordoned


def _name(number: int) -> ShardName:
    return ShardName(f"shard-{number}")


def _staying(seen: Observed) -> list[int]:
    """Members that are asked for."""
    ring_map = map_of(seen)
    members = [] if ring_map is None else [ordinal_of(member.name) for member in ring_map.members]
    return [number for number in members if number < seen.ring.spec.replicas]


def _is_ready(seen: Observed, number: int) -> bool:
    return number in seen.pods and is_ready(seen.pods[number])


def is_empty(seen: Observed, number: int) -> bool:
    """Whether a shard has nothing that anybody could miss, by the map and by its own word."""
    ring_map, name = map_of(seen), _name(number)
    if ring_map is None or ring_map.member(name) is None:
        return True
    return serves_nothing(view_of(seen), ring_map, name)


def can_hand_over(seen: Observed, number: int) -> bool:
    """Whether it can give its slots to somebody: it serves, it knows how, and so does another that may have them."""

    def able(other: int) -> bool:
        said = seen.endpoints.get(_name(other))
        return _is_ready(seen, other) and said is not None and said.serves >= 0

    staying, cordoned = _staying(seen), _cordoned_by_people(seen)
    takers = [other for other in staying if other != number and _name(other) not in cordoned]
    return number in staying and able(number) and any(map(able, takers))
