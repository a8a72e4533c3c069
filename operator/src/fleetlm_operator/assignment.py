"""Which shard should own which slot. Pure.

Promise: every member gets `slots // members` slots or one more; no slot moves that need not; the answer depends on the
arguments only, so that any controller continues the same plan. Must not be done here: deciding who is a member, or
moving anything (a target is not an owner: only a move makes one).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fleetlm_common.ids import ShardName


def assign(owners: Sequence[ShardName | None], members: Sequence[ShardName]) -> list[ShardName]:
    """The owners to aim for.

    Args:
        owners: the owner of each slot now, indexed by slot; None where there is none yet. An owner that is not among
            `members` (it leaves, or is cordoned) loses its slots.
        members: who may own slots, in the ring's order; among equals the earlier one gets the slot more.

    Raises:
        ValueError: nobody may own slots, or a member is named twice.
    """
    if not members or len(set(members)) != len(members):
        raise ValueError("members must be different names, at least one")
    room = _quotas(Counter(owner for owner in owners if owner is not None), members, slots=len(owners))
    kept: list[ShardName | None] = []
    for owner in owners:  # the lowest slots stay: those of a shard that only grew or only shrank remain few ranges
        stays = owner is not None and room.get(owner, 0) > 0
        kept.append(owner if stays else None)
        if stays and owner is not None:
            room[owner] -= 1
    takers = (member for member in members for _ in range(room[member]))
    return [next(takers) if owner is None else owner for owner in kept]


def moves_needed(owners: Sequence[ShardName], members: Sequence[ShardName]) -> int:
    """How many slots would change their owner."""
    return sum(now != then for now, then in zip(owners, assign(owners, members), strict=True))


def _quotas(held: Counter[ShardName], members: Sequence[ShardName], *, slots: int) -> dict[ShardName, int]:
    """How many slots each member gets: those that hold most get the one more, which moves the fewest."""
    share, extra = divmod(slots, len(members))
    by_holding = sorted(members, key=lambda member: -held[member])
    return {member: share + (place < extra) for place, member in enumerate(by_holding)}
