"""Steps that change a ring map, and the one next map that they make together. Pure.

    Join    a member more, without slots             Leave   a member less; it owned nothing and no move named it
    Begin   a move in `Copying`                      Seal    the move in `Sealing`
    Commit  owner = target, move gone                Abort   move gone, the owner stays
    Forget  a member less that is dead for good; likewise
    Rebind  a member's volume is another one: what it owns it gets anew, its moves are gone

Promise: `after` makes epoch + 1 of exactly these steps; a step that the map does not allow raises (a map that exists is
whole). Only Commit changes an owner, only Rebind a volume. Must not be done here: deciding (`planning.py`,
`moving.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from fleetlm_common.ids import Epoch, ShardName, Slot
from fleetlm_common.ring import Member, Move, RingMap, SlotRange, folded, restored_via


class Join(msgspec.Struct, frozen=True):
    """`member` may own slots from now on."""

    member: Member

    def __str__(self) -> str:
        return f"{self.member.name} joined"


class Leave(msgspec.Struct, frozen=True):
    """`shard` is no member any more."""

    shard: ShardName

    def __str__(self) -> str:
        return f"{self.shard} left"


class Forget(msgspec.Struct, frozen=True):
    """`member` is none any more, by people's word: it does not answer."""

    member: Member

    def __str__(self) -> str:
        return f"forgot {self.member.name} and its volume {self.member.volume_id}"


class Begin(msgspec.Struct, frozen=True):
    """Hand `slots` over."""

    slots: tuple[Slot, ...]
    source: ShardName
    target: ShardName

    def __str__(self) -> str:
        return f"began to move {counted(len(self.slots))} from {self.source} to {self.target}"


class Seal(msgspec.Struct, frozen=True):
    """The source stops writing."""

    move: Move

    def __str__(self) -> str:
        return f"sealed {told(self.move)}"


class Commit(msgspec.Struct, frozen=True):
    """The target is the owner."""

    move: Move

    def __str__(self) -> str:
        return f"committed {told(self.move)}"


class Abort(msgspec.Struct, frozen=True):
    """The source stays the owner; `failed`: not because people changed their mind, so it is tried again later."""

    move: Move
    why: str
    failed: bool

    def __str__(self) -> str:
        return f"aborted {told(self.move)}: {self.why}"


class Rebind(msgspec.Struct, frozen=True):
    """`member.volume_id` takes the place of the volume that people gave up."""

    member: Member

    def __str__(self) -> str:
        return f"bound {self.member.name} to volume {self.member.volume_id}, to be filled from the archive"


Step = Join | Leave | Forget | Begin | Seal | Commit | Abort | Rebind


def after(ring: RingMap, steps: Iterable[Step]) -> RingMap:  # noqa: C901 - one case a step
    """The map that follows `ring`.

    Raises:
        ValueError: the steps do not fit the map or each other.
    """
    epoch = Epoch(ring.epoch + 1)
    members = list(ring.members)
    moves = {move.id: move for move in ring.moves}
    table = ring.owners()
    begun: list[Move] = []
    for step in steps:
        match step:
            case Join(member):
                members.append(member)
            case Rebind(member):
                members = [member if each.name == member.name else each for each in members]
                moves = {each.id: each for each in moves.values() if member.name not in (each.source, each.target)}
                table = _owned_anew(table, member.name, epoch)
            case Leave(shard):
                members = [member for member in members if member.name != shard]
            case Forget(member):
                members = [each for each in members if each != member]
            case Begin(slots, source, target):
                ident = f"{epoch}.{len(begun) + 1}"
                begun.append(Move(ident, slots, source, target, "Copying", epoch))
            case Seal(move):
                moves[move.id] = msgspec.structs.replace(_there(moves, move), state="Sealing")
            case Abort(move):
                del moves[_there(moves, move).id]
            case Commit(move):
                if _there(moves, move).state != "Sealing":
                    raise ValueError(f"move {move.id} is not sealed")
                del moves[move.id]
                for slot in move.slots:
                    table[slot] = SlotRange(slot, slot, move.target, epoch, move.id)
    return msgspec.structs.replace(
        ring,
        epoch=epoch,
        members=tuple(members),
        ranges=folded(table),
        moves=(*moves.values(), *begun),
    )


def _owned_anew(table: list[SlotRange], owner: ShardName, epoch: Epoch) -> list[SlotRange]:
    via = restored_via(epoch)
    return [SlotRange(at.first, at.last, owner, epoch, via) if at.owner == owner else at for at in table]


def told(move: Move) -> str:
    """A move in words."""
    return f"move {move.id} ({counted(len(move.slots))} from {move.source} to {move.target})"


def counted(slots: int) -> str:
    """A number of slots in words."""
    return "1 slot" if slots == 1 else f"{slots} slots"


def _there(moves: dict[str, Move], move: Move) -> Move:
    if moves.get(move.id) != move:
        raise ValueError(f"there is no such move as {move.id}")
    return move
