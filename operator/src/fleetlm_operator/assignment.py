"""Which shard should own which slot. Pure.

Promise: every member gets `slots // members` slots or one more (beside what people pinned, and what an avoided member
lacks); no slot moves that need not; the answer depends on the arguments only, so that any controller continues the same
plan. Must not be done here: deciding who is a member, or moving anything (a target is not an owner: only a move makes
one).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from fleetlm_common.ids import ShardName

NO_PINS: Final[Mapping[int, ShardName]] = MappingProxyType({})


def assign(
    owners: Sequence[ShardName | None],
    members: Sequence[ShardName],
    pins: Mapping[int, ShardName] = NO_PINS,
    avoided: Collection[ShardName] = (),
) -> list[ShardName]:
    """The owners to aim for.

    Args:
        owners: the owner of each slot now, indexed by slot; None where there is none yet. An owner that is not among
            `members` (it leaves, or is cordoned) loses its slots.
        members: who may own slots, in the ring's order; among equals the earlier one gets the slot more.
        pins: slots that people want on a shard; those of others than `members` mean nothing. A shard with more pins
            than its share has exactly those, and the others share the rest.
        avoided: members that keep what they have, up to a share, and get nothing, pins included; the others share what
            is left.

    Raises:
        ValueError: nobody may get slots, or a member is named twice.
    """
    if len(set(members)) != len(members) or set(members) <= set(avoided):
        raise ValueError("members must be different names, at least one that is not avoided")
    pinned = {
        slot: shard
        for slot, shard in pins.items()
        if shard in members and (shard not in avoided or owners[slot] == shard)
    }
    held = Counter(pinned.get(slot, owner) for slot, owner in enumerate(owners) if owner is not None or slot in pinned)
    room = _quotas(held, members, slots=len(owners), pinned=Counter(pinned.values()), avoided=avoided)
    for shard in pinned.values():
        room[shard] -= 1
    kept: list[ShardName | None] = []
    for slot, owner in enumerate(owners):  # the lowest slots stay: a shard that only grew or shrank has few ranges
        if slot in pinned:
            kept.append(pinned[slot])
            continue
        stays = owner is not None and room.get(owner, 0) > 0
        kept.append(owner if stays else None)
        if stays and owner is not None:
            room[owner] -= 1
    takers = (member for member in members for _ in range(room[member]))
    return [next(takers) if owner is None else owner for owner in kept]


def moves_needed(owners: Sequence[ShardName], members: Sequence[ShardName]) -> int:
    """How many slots would change their owner."""
    return sum(now != then for now, then in zip(owners, assign(owners, members), strict=True))


def _quotas(
    held: Counter[ShardName | None],
    members: Sequence[ShardName],
    *,
    slots: int,
    pinned: Counter[ShardName],
    avoided: Collection[ShardName],
) -> dict[ShardName, int]:
    """How many slots each member gets: one level for all, but no less than its pins, and no more than the avoided have.

    Those that hold most get the one more, which moves the fewest.
    """

    def at(level: int) -> dict[ShardName, int]:
        raised = {member: max(level, pinned[member]) for member in members}
        return {each: min(count, held[each]) if each in avoided else count for each, count in raised.items()}

    # The highest level for which there are slots enough; what is left of them reaches the next one for some.
    level = bisect_right(range(slots + 1), slots, key=lambda level: sum(at(level).values())) - 1
    quotas, higher = at(level), at(level + 1)
    risers = sorted((each for each in members if higher[each] > quotas[each]), key=lambda each: -held[each])
    return quotas | {each: higher[each] for each in risers[: slots - sum(quotas.values())]}
