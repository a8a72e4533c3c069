"""What to do about what was observed. Pure: the same view gives the same decision, on every controller.

    no map, shards missing        wait
    no map, every shard is there  make the first map: epoch 1, each member bound to the volume that it announced
    another volume than the map's `VolumeLost`: say so and hold; never bind it anew (the data is gone, a person decides)
    other shards than asked for   hold and say how many slots would move (moves are not built yet)

Promise: a decision never takes a slot from an owner and never guesses who is alive. Must not be done here: I/O.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Final, Literal

import msgspec

from fleetlm_common.control import RingSpec, ShardEndpoint, View
from fleetlm_common.ids import Epoch, ShardName
from fleetlm_common.ring import SHARDS_MAX, Member, RingMap, ranges_from
from fleetlm_common.slots import SLOTS_MAX, SLOTS_MIN
from fleetlm_operator.assignment import assign, moves_needed

Reason = Literal["InvalidSpec", "WaitingForShards", "FirstMap", "VolumeLost", "Held", "ShardsNotReady", "Steady"]

FIRST_EPOCH: Final = Epoch(1)


class Decision(msgspec.Struct, frozen=True):
    """What to do and what to say.

    `new_map` is to replace the map that was observed (None: nothing to do now). `reason` is stable, for alerts and
    tests; `sentence` is for people.
    """

    new_map: RingMap | None
    reason: Reason
    sentence: str


def plan(view: View) -> Decision:
    """Decide what to do about `view`."""
    complaint = _complaint(view.spec)
    if complaint is not None:
        return Decision(None, "InvalidSpec", complaint)
    if view.map is None:
        return _bring_up(view)
    return _keep(view, view.map)


def shard_names(spec: RingSpec) -> list[ShardName]:
    """The shards that were asked for, in the ring's order."""
    return [ShardName(f"shard-{ordinal}") for ordinal in range(spec.shards)]


def volumes_lost(view: View) -> dict[ShardName, ShardEndpoint]:
    """Members that announce another volume than the one that the map binds them to."""
    members = () if view.map is None else view.map.members
    announced = ((member, view.shards.get(member.name)) for member in members)
    return {
        member.name: endpoint
        for member, endpoint in announced
        if endpoint is not None and endpoint.volume_id != member.volume_id
    }


def _complaint(spec: RingSpec) -> str | None:
    """Why nothing can be planned for `spec`."""
    if not SLOTS_MIN <= spec.slots <= SLOTS_MAX:
        return f"held: the ring asks for {spec.slots} slots; there can be {SLOTS_MIN} to {SLOTS_MAX}"
    if not 1 <= spec.shards <= SHARDS_MAX:
        return f"held: the ring asks for {spec.shards} shards; there can be 1 to {SHARDS_MAX}"
    return None


def _bring_up(view: View) -> Decision:
    """The first map is made when every volume is known: a member is its volume."""
    names = shard_names(view.spec)
    missing = [name for name in names if name not in view.shards]
    if missing:
        there = f"{len(names) - len(missing)} of {len(names)}"
        sentence = f"waiting for {_listed(missing)} to announce a volume ({there} did)"
        return Decision(None, "WaitingForShards", sentence)
    endpoints = [view.shards[name] for name in names]
    shared = _shared_volume(endpoints)
    if shared is not None:
        return Decision(None, "Held", shared)
    owners = assign([None] * view.spec.slots, names)
    first = RingMap(
        uid=view.spec.uid,
        slots=view.spec.slots,
        epoch=FIRST_EPOCH,
        members=tuple(Member(endpoint.name, endpoint.volume_id) for endpoint in endpoints),
        ranges=ranges_from([(owner, FIRST_EPOCH) for owner in owners]),
    )
    return Decision(first, "FirstMap", f"made the first map: {view.spec.slots} slots on {_shards(len(names))}, epoch 1")


def _keep(view: View, current: RingMap) -> Decision:
    """There is a map: say how the ring is; whatever would need a move is held."""
    at_epoch = f"epoch {current.epoch}, {current.slots} slots on {_shards(len(current.members))}"
    if (current.uid, current.slots) != (view.spec.uid, view.spec.slots):
        return Decision(None, "Held", f"held: the map ({at_epoch}) belongs to another ring than the spec")
    lost = volumes_lost(view)
    absent = [member.name for member in current.members if member.name not in view.shards]
    unready = [
        member.name
        for member in current.members
        if member.name not in lost and member.name not in absent and not view.shards[member.name].ready
    ]
    held = _held(view.spec, current)
    findings: list[tuple[Reason, str]] = []
    if lost:
        findings.append(("VolumeLost", _lost_sentence(current, lost)))
    if held is not None:
        findings.append(("Held", held))
    if absent or unready:
        findings.append(("ShardsNotReady", _waiting_sentence(absent, unready)))
    if not findings:
        return Decision(None, "Steady", f"steady at {at_epoch}, all ready")
    sentence = "; ".join(text for _, text in findings)
    return Decision(None, findings[0][0], f"{sentence} ({at_epoch})")


def _held(spec: RingSpec, current: RingMap) -> str | None:
    """What people asked for and only moves could do."""
    wanted = shard_names(spec)
    members = [member.name for member in current.members]
    joining = [name for name in wanted if name not in members]
    leaving = [name for name in members if name not in wanted]
    slots = moves_needed([found.owner for found in current.owners()], wanted)
    if not joining and not leaving and not slots:
        return None
    cannot = ((joining, "join"), (leaving, "leave"))
    changes = [f"{_listed(names)} cannot {verb}" for names, verb in cannot if names]
    what = " and ".join(changes or ["the ring stays uneven"])
    return f"held: {what}, {slots} slots would have to move, and slots cannot move yet"


def _lost_sentence(current: RingMap, lost: dict[ShardName, ShardEndpoint]) -> str:
    """Name each shard that lost its volume, with both ids, so that people can look for the right one."""
    bound = {member.name: member.volume_id for member in current.members}
    each = [
        f"{name} lost its volume: the map binds it to {bound[name]}, it announces {endpoint.volume_id}"
        for name, endpoint in lost.items()
    ]
    return "; ".join(each) + "; bring the old volume back, its slots stay with it"


def _waiting_sentence(absent: list[ShardName], unready: list[ShardName]) -> str:
    """Who is waited for; ownership waits too."""
    parts = [f"{_listed(absent)} announced nothing yet"] if absent else []
    if unready:
        parts.append(f"waiting for {_listed(unready)} to become ready")
    return "; ".join(parts)


def _shared_volume(endpoints: list[ShardEndpoint]) -> str | None:
    """Two shards that announce one volume are a mistake of configuration; a map would bind both to it."""
    holders: defaultdict[str, list[ShardName]] = defaultdict(list)
    for endpoint in endpoints:
        holders[endpoint.volume_id].append(endpoint.name)
    for volume_id, names in holders.items():
        if len(names) > 1:
            return f"held: {_listed(names)} announce the same volume {volume_id}"
    return None


def _listed(names: list[ShardName]) -> str:
    """Names as words; many are counted."""
    if len(names) > 4:
        return f"{', '.join(names[:3])} and {len(names) - 3} more"
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count} shards"
