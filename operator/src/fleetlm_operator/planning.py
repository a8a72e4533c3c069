"""What to do about what was observed. Pure: the same view and memory give the same decision, on every controller.

    no map, shards missing        wait
    no map, every shard is there  make the first map: epoch 1, each member bound to the volume that it announced
    another volume than the map's `VolumeLost`: say so and hold; bound anew only if people gave the old one up
    asked for, announced          it joins, without slots
    a member, not asked for       it leaves when it owns nothing and says so itself; or people had it forgotten, and
                                  it owns nothing and does not answer (`forgetting.py`)
    uneven, pinned, cordoned      moves (`moving.py`)
    avoided (its node goes soon)  it keeps what it has and gets nothing, unless that holds for all

Promise: a slot changes its owner only by a confirmed move, and because of what people asked for; never because a shard
is silent, slow or busy. Must not be done here: I/O, reading clocks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Final, Literal

import msgspec

from fleetlm_common.control import RingSpec, ShardEndpoint, View, shard_names
from fleetlm_common.ids import Epoch, ShardName
from fleetlm_common.ring import SHARDS_MAX, Member, RingMap, ranges_from
from fleetlm_common.slots import SLOTS_MAX, SLOTS_MIN
from fleetlm_operator.assignment import assign
from fleetlm_operator.forgetting import Forgetting, forget, forgotten_volume
from fleetlm_operator.mapsteps import Abort, Commit, Forget, Join, Leave, Rebind, Step, after
from fleetlm_operator.memory import NO_MEMORY, Memory
from fleetlm_operator.moving import Moves, decide, is_bound, moving_words, stalled_words

Reason = Literal[
    "InvalidSpec",
    "WaitingForShards",
    "FirstMap",
    "VolumeLost",
    "VolumeReplaced",
    "Held",
    "MoveStalled",
    "ShardsNotReady",
    "Moving",
    "Steady",
]

FIRST_EPOCH: Final = Epoch(1)
JOIN_WAIT_S: Final = 15.0
"""Shards that are asked for together join within seconds of each other. Moving slots to the first of them at once would
move some of them twice; one that does not come holds up the others for no longer than this."""
STEPS_TOLD_MAX: Final = 3
"""Steps of one change that are named in the sentence; the log has each."""


class Decision(msgspec.Struct, frozen=True):
    """What to do and what to say.

    `new_map` is to replace the map that was observed (None: nothing to do now), and differs from it by `steps`.
    `reason` is stable, for alerts and tests; `sentence` is for people. `memory` is to be remembered if the new map (if
    any) was taken. `again_s`: time alone changes the decision so soon.
    """

    new_map: RingMap | None
    reason: Reason
    sentence: str
    steps: tuple[Step, ...] = ()
    memory: Memory = NO_MEMORY
    again_s: float | None = None
    slots_left: int = 0
    """Slots that are not where they should be."""
    not_forgotten: tuple[str, ...] = ()
    """Members that are not forgotten although people want it, each with why."""


def plan(view: View, memory: Memory = NO_MEMORY, *, now_s: float = 0.0, only_end: bool = False) -> Decision:
    """Decide what to do about `view`.

    Args:
        view: what was seen.
        memory: of the decisions before.
        now_s: monotonic.
        only_end: only end what is sealed, whose writers wait: nothing else is to be changed.
    """
    complaint = _complaint(view.spec)
    if complaint is not None:
        return Decision(None, "InvalidSpec", complaint, memory=memory)
    if view.map is None:
        decision = _bring_up(view)
        return msgspec.structs.replace(decision, new_map=None) if only_end else decision
    return _keep(view, view.map, memory, now_s, only_end=only_end)


def serves_nothing(view: View, current: RingMap, name: ShardName) -> bool:
    """Whether a member owns nothing, no move names it, and it has said so since the last change of an owner."""
    endpoint = view.shards.get(name)
    return (
        not any(found.owner == name for found in current.ranges)
        and not any(name in (move.source, move.target) for move in current.moves)
        and endpoint is not None
        and is_bound(view, current, name)
        and endpoint.serves == 0
        and endpoint.epoch >= max(found.epoch for found in current.ranges)
    )


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
    if any(not 0 <= pin.first <= pin.last < spec.slots for pin in spec.pins):
        return f"held: a pin names slots that are none; there are 0 to {spec.slots - 1}"
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
    shared = _shared_volume(view, None, names)
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


def _keep(view: View, current: RingMap, memory: Memory, now_s: float, *, only_end: bool) -> Decision:
    """There is a map: bring the ring nearer to what is asked for, and say how it is."""
    if (current.uid, current.slots) != (view.spec.uid, view.spec.slots):
        text = f"held: the map ({_at_epoch(current)}) belongs to another ring than the spec"
        return Decision(None, "Held", text, memory=memory)
    rebound = _rebound(view, current)
    if rebound:
        anew = after(current, rebound)
        sentence = f"{_told(rebound)} ({_at_epoch(anew)})"
        return Decision(anew, "VolumeReplaced", sentence, steps=tuple(rebound), memory=memory)
    wanted = shard_names(view.spec)
    absent = [name for name in wanted if current.member(name) is None]
    memory = memory.awaiting(absent, now_s)
    forgotten = {name: volume_id for name in absent if (volume_id := forgotten_volume(view, name))}
    joins = [name for name in absent if name in view.shards and name not in forgotten]
    shared = _shared_volume(view, current, joins)
    members = [name for name in wanted if current.member(name) is not None]
    eligible = [name for name in members if name not in view.spec.cordoned]
    avoided = [name for name in eligible if name in view.avoided]
    if avoided == eligible:  # somebody must take what others give
        avoided = []
    holds = [shared] if shared else []
    holds += [_forgotten_sentence(name, volume_id) for name, volume_id in forgotten.items()]
    steps: list[Step] = [] if shared else [Join(Member(name, view.shards[name].volume_id)) for name in joins]
    moves = None
    if eligible:
        patient = any(now_s - since_s < JOIN_WAIT_S for since_s in memory.awaited_since_s.values())
        pins = {slot: pin.shard for pin in view.spec.pins for slot in range(pin.first, pin.last + 1)}
        moves = decide(
            view,
            current,
            eligible,
            avoided=avoided,
            pins=pins,
            draining_only=patient,
            memory=memory,
            now_s=now_s,
        )
        memory = moves.memory
        steps += moves.steps
    elif members:
        holds.append(
            f"held: {_listed(members)} {'is' if len(members) == 1 else 'are all'} cordoned, nobody may own slots"
        )
        # No writer must wait for the end of a move that nobody will end.
        steps += [Abort(move, "nobody may own slots", failed=False) for move in current.moves]
    forgetting = forget(view, current, memory, now_s)
    memory = forgetting.memory
    steps += _leaves(view, current, set(wanted), forgetting)
    if only_end:
        steps = [step for step in steps if isinstance(step, Commit | Abort) and step.move.state == "Sealing"]
    findings = _findings(view, current, absent=absent, moves=moves, holds=holds)
    new_map = after(current, steps) if steps else None
    if new_map is not None:  # what is done now says more than how far the ring was before
        findings = [each for each in findings if each[0] != "Moving"]
        findings.append(("Moving", _told(steps)))
    reason, text = _summed_up(findings, new_map or current)
    if avoided:
        text += f"; on cordoned nodes, so without new slots: {_listed(avoided)}"
    return Decision(
        new_map,
        reason,
        "; ".join([text, *forgetting.refused]),
        steps=tuple(steps),
        memory=memory,
        again_s=_soonest(moves, memory, now_s, forgetting.again_s),
        slots_left=0 if moves is None else moves.left,
        not_forgotten=forgetting.refused,
    )


def _summed_up(findings: list[tuple[Reason, str]], ring: RingMap) -> tuple[Reason, str]:
    """The worst finding's reason, and all of them in a sentence."""
    if not findings:
        return "Steady", f"steady at {_at_epoch(ring)}, all ready"
    return findings[0][0], f"{'; '.join(text for _, text in findings)} ({_at_epoch(ring)})"


def _rebound(view: View, current: RingMap) -> list[Step]:
    """Shards whose volume people gave up, and that have another one, which is nobody's."""
    given_up = set(view.spec.given_up)
    bound = {member.name: member.volume_id for member in current.members}
    found = {name: endpoint.volume_id for name, endpoint in volumes_lost(view).items() if bound[name] in given_up}
    taken = Counter([*bound.values(), *given_up, *found.values()])
    return [Rebind(Member(name, volume_id)) for name, volume_id in found.items() if taken[volume_id] == 1]


def _findings(
    view: View, current: RingMap, *, absent: list[ShardName], moves: Moves | None, holds: list[str]
) -> list[tuple[Reason, str]]:
    """What is to be said, the worst first."""
    lost = volumes_lost(view)
    silent = [member.name for member in current.members if member.name not in view.shards]
    unready = [
        member.name
        for member in current.members
        if member.name not in lost and member.name not in silent and not view.shards[member.name].ready
    ]
    old = [] if moves is None else [name for name in moves.awaited if _cannot_move(view, current, name)]
    if old:
        holds = [*holds, f"held: {_listed(old)} must be upgraded first: its build cannot move slots"]
    findings: list[tuple[Reason, str]] = []
    if lost:
        findings.append(("VolumeLost", _lost_sentence(current, lost)))
    if holds:
        findings.append(("Held", "; ".join(holds)))
    if moves is not None and moves.stalls:
        findings.append(("MoveStalled", stalled_words(moves)))
    waiting = [name for name in absent if name not in view.shards]
    if silent or unready or waiting:
        findings.append(("ShardsNotReady", _waiting_sentence([*silent, *waiting], unready)))
    leaving = _leaving(view, current)
    if moves is not None and (moves.left or current.moves):
        findings.append(("Moving", moving_words(current, moves)))
    elif leaving:
        findings.append(("Moving", f"waiting for {_listed(leaving)} to say that it serves nothing any more"))
    return findings


def _cannot_move(view: View, current: RingMap, name: ShardName) -> bool:
    """It serves, and says nothing of moves: an older build."""
    return is_bound(view, current, name) and view.shards[name].ready and view.shards[name].serves < 0


def _leaving(view: View, current: RingMap) -> list[ShardName]:
    wanted = set(shard_names(view.spec))
    return [member.name for member in current.members if member.name not in wanted]


def _leaves(view: View, current: RingMap, wanted: set[ShardName], forgetting: Forgetting) -> list[Leave | Forget]:
    """Members that nobody asks for and that serve nothing any more, by their own word or because they are forgotten."""
    gone = [
        member.name
        for member in current.members
        if member.name not in wanted and serves_nothing(view, current, member.name)
    ]
    return [*map(Leave, gone), *(step for step in forgetting.steps if step.member.name not in gone)]


def _soonest(moves: Moves | None, memory: Memory, now_s: float, forgetting_s: float | None) -> float | None:
    """When time alone changes something."""
    ahead = [since_s + JOIN_WAIT_S - now_s for since_s in memory.awaited_since_s.values()]
    if forgetting_s is not None:
        ahead.append(forgetting_s)
    if moves is not None and moves.again_s is not None:
        ahead.append(moves.again_s)
    return min((pause_s for pause_s in ahead if pause_s > 0), default=None)


def _told(steps: list[Step]) -> str:
    """The steps of one change in words."""
    rest = len(steps) - STEPS_TOLD_MAX
    return ", ".join(map(str, steps[:STEPS_TOLD_MAX])) + (f" and {rest} more steps" if rest > 0 else "")


def _at_epoch(ring: RingMap) -> str:
    return f"epoch {ring.epoch}, {ring.slots} slots on {_shards(len(ring.members))}"


def _lost_sentence(current: RingMap, lost: dict[ShardName, ShardEndpoint]) -> str:
    """Name each shard that lost its volume, with both ids, so that people can look for the right one."""
    bound = {member.name: member.volume_id for member in current.members}
    each = [
        f"{name} lost its volume: the map binds it to {bound[name]}, it announces {endpoint.volume_id}"
        for name, endpoint in lost.items()
    ]
    return "; ".join(each) + "; bring the old volume back, its slots stay with it (or give it up: docs/archive.md)"


def _forgotten_sentence(name: ShardName, volume_id: str) -> str:
    """Both ways out are people's to choose."""
    return (
        f"held: {name} announces volume {volume_id}, which people had the ring forget; give it an empty volume, "
        "or take the word back"
    )


def _waiting_sentence(absent: list[ShardName], unready: list[ShardName]) -> str:
    """Who is waited for; ownership waits too."""
    parts = [f"{_listed(absent)} announced nothing yet"] if absent else []
    if unready:
        parts.append(f"waiting for {_listed(unready)} to become ready")
    return "; ".join(parts)


def _shared_volume(view: View, current: RingMap | None, joining: list[ShardName]) -> str | None:
    """Two shards that announce one volume are a mistake of configuration; a map would bind both to it."""
    holders: defaultdict[str, list[ShardName]] = defaultdict(list)
    for member in () if current is None else current.members:
        holders[member.volume_id].append(member.name)
    for name in joining:
        holders[view.shards[name].volume_id].append(name)
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
