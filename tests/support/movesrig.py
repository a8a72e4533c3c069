"""Two or three whole shards in one loop and a controller that a test plays by hand: moves, step by step.

    async with moves_rig(2) as ring:
        move = await ring.begin([0, 1], "shard-0", "shard-1")
        await ring.says(move, "Ready")
        await ring.seal(move); await ring.says(move, "Confirmed"); await ring.commit(move)

Promise: shards are the product's own, over real sockets; each may be killed and booted again on its volume. Must not be
done here: deciding when a step is allowed (a test wants the forbidden ones, too).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import msgspec

from fleetlm_common.control import MoveProgress, RingSpec
from fleetlm_common.ids import Epoch, SessionId, ShardName, Slot
from fleetlm_common.ring import Member, Move, RingMap, SlotRange
from fleetlm_common.slots import slot_of
from fleetlm_shard.config import ShardConfig
from fleetlm_shard.ownership import Ownership
from tests.support.eventually import eventually
from tests.support.memorycontrol import MemoryControlPlane
from tests.support.shardrig import CONFIG, SLOTS, Rig, RigClock, shard_rig
from tests.support.simdisk import Loss, SimVolume


@dataclass
class MovesRig:
    """The shards of one ring."""

    control: MemoryControlPlane
    names: list[ShardName]
    clock: RigClock
    volumes: dict[ShardName, SimVolume]
    config: ShardConfig
    own: dict[int, dict[str, object]] = field(default_factory=dict[int, dict[str, object]])
    """Settings of single shards."""
    rigs: dict[ShardName, Rig] = field(default_factory=dict[ShardName, Rig])
    stacks: dict[ShardName, AsyncExitStack] = field(default_factory=dict[ShardName, AsyncExitStack])
    lives: int = 0

    @property
    def map(self) -> RingMap:
        """The newest."""
        assert self.control.view.map is not None
        return self.control.view.map

    def __getitem__(self, number: int) -> Rig:
        return self.rigs[self.names[number]]

    async def start(self, number: int) -> Rig:
        """Boot a shard on its volume."""
        name = self.names[number]
        self.lives += 1
        stack = AsyncExitStack()
        self.rigs[name] = await stack.enter_async_context(
            shard_rig(
                self.volumes[name],
                clock=self.clock,
                control=self.control,
                process=f"{name}-{self.lives}",
                name=name,
                config=msgspec.structs.replace(self.config, **self.own.get(number, {})),
            )
        )
        self.stacks[name] = stack
        return self.rigs[name]

    async def kill(self, number: int, *, loss: Loss | None = None) -> None:
        """As SIGKILL, or as a loss of power; the volume stays. Harmless for one that is dead."""
        name = self.names[number]
        rig = self.rigs.pop(name, None)
        if rig is None:
            return
        volume = self.volumes[name]
        for process in volume.processes():
            volume.kill(process)
        await self.stacks.pop(name).aclose()
        if loss is not None:
            volume.power_loss(loss)

    async def restart(self, number: int, *, loss: Loss | None = None) -> Rig:
        """Kill and boot."""
        await self.kill(number, loss=loss)
        return await self.start(number)

    # What a controller does ------------------------------------------------------------------------------------------

    async def swap(
        self, *, moves: tuple[Move, ...], ranges: tuple[SlotRange, ...] | None = None, acted: bool = True
    ) -> RingMap:
        """The next map; returns when the living shards have acted on it."""
        current = self.map
        ring = msgspec.structs.replace(
            current, epoch=Epoch(current.epoch + 1), moves=moves, ranges=ranges or current.ranges
        )
        await self.control.compare_and_swap(expected=current.epoch, new=ring)
        if acted:
            await self.acted()
        return ring

    async def acted(self) -> None:
        """The living shards have acted on the newest map."""
        for rig in list(self.rigs.values()):
            ownership = rig.shard.ownership
            await eventually(partial(_has_acted, ownership, self.map.epoch), f"epoch {self.map.epoch} is acted on")

    async def begin(self, slots: list[int], source: int, target: int, *, acted: bool = True) -> Move:
        """A move in `Copying`."""
        epoch = Epoch(self.map.epoch + 1)
        own = tuple(Slot(slot) for slot in sorted(slots))
        move = Move(f"{epoch}.1", own, self.names[source], self.names[target], "Copying", epoch)
        await self.swap(moves=(*self.map.moves, move), acted=acted)
        return move

    async def seal(self, move: Move, *, acted: bool = True) -> None:
        """`Sealing`."""
        sealed = msgspec.structs.replace(move, state="Sealing")
        sealing = tuple(sealed if each.id == move.id else each for each in self.map.moves)
        await self.swap(moves=sealing, acted=acted)

    async def abort(self, move: Move, *, acted: bool = True) -> None:
        """The move is gone, the owner stays."""
        await self.swap(moves=tuple(each for each in self.map.moves if each.id != move.id), acted=acted)

    async def commit(self, move: Move, *, acted: bool = True) -> None:
        """The target is the owner."""
        epoch = Epoch(self.map.epoch + 1)
        ranges = tuple(
            SlotRange(Slot(slot), Slot(slot), move.target, epoch, move.id) if slot in move.slots else _one(found, slot)
            for slot, found in enumerate(self.map.owners())
        )
        await self.swap(moves=tuple(each for each in self.map.moves if each.id != move.id), ranges=ranges, acted=acted)

    def progress(self, move: Move) -> MoveProgress | None:
        """What the target announces."""
        rig = self.rigs.get(move.target)
        said = () if rig is None else rig.shard.moves.progress
        return next((each for each in said if each.id == move.id), None)

    async def says(
        self, move: Move, state: Literal["Copying", "Ready", "Confirmed", "Failed"], *, timeout_s: float = 10.0
    ) -> MoveProgress:
        """Wait until the target says so."""

        def says() -> bool:
            told = self.progress(move)
            return told is not None and told.state == state

        await eventually(says, f"the target says {state}", timeout_s=timeout_s)
        told = self.progress(move)
        assert told is not None
        return told

    async def move(self, slots: list[int], source: int, target: int) -> Move:
        """All of it."""
        move = await self.begin(slots, source, target)
        await self.says(move, "Ready")
        await self.seal(move)
        await self.says(move, "Confirmed")
        await self.commit(move)
        return move


def _one(found: SlotRange, slot: int) -> SlotRange:
    return msgspec.structs.replace(found, first=Slot(slot), last=Slot(slot))


def session_in(slot: int, *, number: int = 0) -> str:
    """A session id of this slot."""
    found = (name for count in range(10_000) if slot_of(SessionId(name := f"s-{count}"), SLOTS) == slot)
    for _ in range(number):
        next(found)
    return next(found)


@asynccontextmanager
async def moves_rig(
    count: int = 2, own: dict[int, dict[str, object]] | None = None, **changes: object
) -> AsyncGenerator[MovesRig]:
    """Shards of which the first owns every slot; `changes` are settings, `own` those of single ones."""
    config = msgspec.structs.replace(CONFIG, **changes)
    control = MemoryControlPlane(RingSpec(uid="ring-1", slots=SLOTS, shards=count))
    names = [ShardName(f"shard-{number}") for number in range(count)]
    ring = MovesRig(control, names, RigClock(), {name: SimVolume() for name in names}, config, own or {})
    members = tuple(
        Member(name, "volume-1" if number == 0 else f"volume-of-{name}") for number, name in enumerate(names)
    )
    try:
        await ring.start(0)
        epoch = Epoch(ring.map.epoch + 1)
        ranges = (SlotRange(Slot(0), Slot(SLOTS - 1), names[0], Epoch(1)),)
        first = RingMap("ring-1", SLOTS, epoch, members, ranges)
        for number in range(1, count):
            # A volume is formatted before a map names it.
            await ring.start(number)
        await control.compare_and_swap(expected=ring.map.epoch, new=first)
        await ring.acted()
        yield ring
    finally:
        for stack in list(ring.stacks.values()):
            await stack.aclose()


def _has_acted(ownership: Ownership, epoch: int) -> bool:
    return ownership.acted_epoch == epoch
