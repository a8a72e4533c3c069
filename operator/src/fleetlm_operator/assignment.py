"""Which shard should own which slot. Pure.

Promise: every member gets `slots // members` slots or one more (beside what people pinned); no slot moves that need
not; the answer depends on the arguments only, so that any controller continues the same plan. Must not be done here:
deciding who is a member, or moving anything (a target is not an owner: only a move makes one).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from fleetlm_common.ids import ShardName

NO_PINS: Final[Mapping[int, ShardName]] = MappingProxyType({})


def assign(
    owners: Sequence[ShardName | None], members: Sequence[ShardName], pins: Mapping[int, ShardName] = NO_PINS
) -> list[ShardName]:
    """The owners to aim for.

    Args:
        owners: the owner of each slot now, indexed by slot; None where there is none yet. An owner that is not among
            `members` (it leaves, or is cordoned) loses its slots.
        members: who may own slots, in the ring's order; among equals the earlier one gets the slot more.
        pins: slots that people want on a shard; those of others than `members` mean nothing. A shard with more pins
            than its share has exactly those, and the others share the rest.

    Raises:
        ValueError: nobody may own slots, or a member is named twice.
    """
    if not members or len(set(members)) != len(members):
        raise ValueError("members must be different names, at least one")
    pinned = {slot: shard for slot, shard in pins.items() if shard in members}
    held = Counter(pinned.get(slot, owner) for slot, owner in enumerate(owners) if owner is not None or slot in pinned)
    room = _quotas(held, members, slots=len(owners), pinned=Counter(pinned.values()))
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
    held: Counter[ShardName | None], members: Sequence[ShardName], *, slots: int, pinned: Counter[ShardName]
) -> dict[ShardName, int]:
    """How many slots each member gets: those that hold most get the one more, which moves the fewest."""
    quotas: dict[ShardName, int] = {}
    sharing = list(members)
    while True:
        share, extra = divmod(slots, len(sharing))
        full = [member for member in sharing if pinned[member] > share]
        if len(full) <= extra and all(pinned[member] == share + 1 for member in full):
            break
        # More pins than an even share: they count as they are, and what is left is shared by the others.
        for member in full:
            quotas[member] = pinned[member]
            slots -= pinned[member]
            sharing.remove(member)
    by_holding = sorted(sharing, key=lambda member: (pinned[member] <= share, -held[member]))
    return quotas | {member: share + (place < extra) for place, member in enumerate(by_holding)}
