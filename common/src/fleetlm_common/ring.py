"""The ring map: which shard owns which slots at which epoch, and the moves in flight.

Promise: a `RingMap` that exists is whole: its ranges cover each slot exactly once, in order, owned by members; its
moves take slots from their owner to another member, and no slot is in two of them.
Must not be done here: storing, watching (`control.py`) or planning (the controller).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Final, Literal

import msgspec

from fleetlm_common.ids import Epoch, ShardName, Slot
from fleetlm_common.slots import SLOTS_MAX, SLOTS_MIN

MAP_FORMAT: Final = 1
SHARDS_MAX: Final = 256
"""Members of one ring: the map stays one small object."""
MOVES_MAX: Final = 64
"""Moves in flight at once."""
_MOVE_ID: Final = re.compile(r"[1-9][0-9]*\.[1-9][0-9]*")


class SlotRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Slots `first` to `last` (inclusive), owned by `owner` since the map of `epoch`.

    The number that fences that owner.
    """

    first: Slot
    last: Slot
    owner: ShardName
    epoch: Epoch
    via: str = ""
    """Id of the move that made this owner; "" is the first assignment of a ring, `<epoch>.0` a volume in place of one
    that people gave up: the owner brings what the archive has (docs/archive.md)."""


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A shard that owns or may own slots, bound to the volume that it had when it joined.

    A shard whose volume has another id has lost its data and must refuse to serve (`VolumeLost`).
    """

    name: ShardName
    volume_id: str


class Move(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A handoff of slots in flight (written before it is acted on).

    `id` is `<epoch>.<number>`: the epoch of the map that began it and its number among those begun there, so that no
    two moves of a ring ever share one. `slots` ascend.
    """

    id: str
    slots: tuple[Slot, ...]
    source: ShardName
    target: ShardName
    state: Literal["Copying", "Sealing"]
    epoch: Epoch


class RingMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who owns what.

    `uid` names the ring for life, `slots` is fixed for life, `epoch` grows by one with each change.
    """

    uid: str
    slots: int
    epoch: Epoch
    members: tuple[Member, ...]
    ranges: tuple[SlotRange, ...]
    moves: tuple[Move, ...] = ()
    format: int = MAP_FORMAT

    def __post_init__(self) -> None:
        """Refuse a map that is not whole."""
        _check(self)

    def owner_of(self, slot: Slot) -> SlotRange:
        """The range that holds `slot` (a linear look: tables for hot paths come from `owners`)."""
        for found in self.ranges:
            if found.first <= slot <= found.last:
                return found
        raise ValueError(f"slot {slot} is not one of {self.slots}")

    def owners(self) -> list[SlotRange]:
        """The range of each slot, indexed by slot."""
        return [found for found in self.ranges for _ in range(found.first, found.last + 1)]

    def slots_of(self, shard: ShardName) -> dict[Slot, Epoch]:
        """The slots that `shard` owns, with the epoch at which it got each."""
        return {
            Slot(slot): found.epoch
            for found in self.ranges
            if found.owner == shard
            for slot in range(found.first, found.last + 1)
        }

    def member(self, shard: ShardName) -> Member | None:
        """The member of that name, if it is one."""
        return next((member for member in self.members if member.name == shard), None)


def _check(ring: RingMap) -> None:
    """Raise ValueError with the first thing that is wrong."""
    names = [member.name for member in ring.members]
    ranges = ring.ranges
    rules = (
        (ring.format == MAP_FORMAT, f"ring map of format {ring.format}, this build reads {MAP_FORMAT}"),
        (SLOTS_MIN <= ring.slots <= SLOTS_MAX, f"{ring.slots} slots; a ring has {SLOTS_MIN} to {SLOTS_MAX}"),
        (ring.epoch >= 1, "epochs begin at 1"),
        (len(set(names)) == len(names) <= SHARDS_MAX, f"members must be at most {SHARDS_MAX} different names"),
        (bool(ranges) and ranges[0].first == 0 and ranges[-1].last == ring.slots - 1, "ranges must cover every slot"),
        (all(found.first <= found.last for found in ranges), "a range ends before it begins"),
        (
            all(one.last + 1 == two.first for one, two in pairwise(ranges)),
            "ranges must neither overlap nor leave a hole",
        ),
        (all(found.owner in names for found in ranges), "a range is owned by no member"),
        (all(found.epoch <= ring.epoch for found in ranges), "a range is newer than its map"),
        (len(ring.moves) <= MOVES_MAX, f"more than {MOVES_MAX} moves in flight"),
    )
    for holds, complaint in rules:
        if not holds:
            raise ValueError(complaint)
    if ring.moves:
        _check_moves(ring)


def _check_moves(ring: RingMap) -> None:
    """Raise ValueError with the first thing that is wrong with the moves of a map that is whole without them."""
    names = {member.name for member in ring.members}
    owners = ring.owners()
    ids = [move.id for move in ring.moves]
    moving = [slot for move in ring.moves for slot in move.slots]
    if len(set(ids)) != len(ids):
        raise ValueError("two moves share an id")
    if len(set(moving)) != len(moving):
        raise ValueError("a slot is in two moves")
    for move in ring.moves:
        rules = (
            (0 < move.epoch <= ring.epoch, "is newer than its map"),
            (_MOVE_ID.fullmatch(move.id) is not None, "has an id that is none"),
            (move.id.startswith(f"{move.epoch}."), "has an id of another epoch"),
            (bool(move.slots), "has no slots"),
            (all(one < two for one, two in pairwise(move.slots)), "has slots that do not ascend"),
            (all(0 <= slot < ring.slots for slot in move.slots), "has slots that are none"),
            (move.source != move.target, "goes nowhere"),
            (move.target in names, "goes to no member"),
        )
        for holds, complaint in rules:
            if not holds:
                raise ValueError(f"move {move.id} {complaint}")
        if any(owners[slot].owner != move.source for slot in move.slots):
            raise ValueError(f"move {move.id} takes slots that {move.source} does not own")


def restored_via(epoch: Epoch) -> str:
    """What stands in `via` when the owner's volume was replaced by the map of `epoch`."""
    return f"{epoch}.0"


def is_restored(via: str) -> bool:
    """Whether the owner has to bring what the archive has."""
    return via.endswith(".0")


def ranges_from(owners: list[tuple[ShardName, Epoch]]) -> tuple[SlotRange, ...]:
    """Fold a table of (owner, epoch) indexed by slot into ranges, neighbours that agree joined."""
    return folded([SlotRange(Slot(slot), Slot(slot), owner, epoch) for slot, (owner, epoch) in enumerate(owners)])


def folded(table: Sequence[SlotRange]) -> tuple[SlotRange, ...]:
    """Ranges from a table indexed by slot (as `owners` gives it; `first` and `last` are not looked at)."""
    ranges: list[SlotRange] = []
    for (owner, epoch, via), slots in groupby(range(len(table)), key=lambda slot: _since(table[slot])):
        found = list(slots)
        ranges.append(SlotRange(Slot(found[0]), Slot(found[-1]), owner, epoch, via))
    return tuple(ranges)


def _since(found: SlotRange) -> tuple[ShardName, Epoch, str]:
    return found.owner, found.epoch, found.via


def encode(ring: RingMap) -> bytes:
    """The map as JSON, for files and for people."""
    return msgspec.json.encode(ring)


def decode(data: bytes) -> RingMap:
    """The inverse of `encode`.

    Raises:
        ValueError: not a whole map; says why (msgspec's ValidationError is one).
    """
    return msgspec.json.decode(data, type=RingMap)
