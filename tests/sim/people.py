"""What people do to the ring in a run, and what `up` does because of it: scale, cordon, pin, restart; processes follow.

Promise: only what is asked for changes (`RingSpec`), so every move is the real controllers' own; a shard that has left
is stopped, its volume stays or is given away, and the same name may come back. `at_rest` says what a ring must look
like that has done everything that was asked for. Must not be done here: faults (`nemesis.py`), planning moves.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final

import msgspec

from fleetlm_common.control import Forgotten, Pin
from fleetlm_common.ids import SessionId, ShardName, Slot
from fleetlm_common.ring import RingMap
from fleetlm_common.slots import slot_of
from tests.sim.burials import Burials
from tests.sim.nodes import ShardNode

if TYPE_CHECKING:
    from tests.sim.world import World

SHARDS_MAX: Final = 4
FOLLOW_S: Final = 0.1
"""How often processes follow the ring."""
STOP_S: Final = 3.0
"""A shard that has left and does not end is killed after so long."""
RESTART_S: Final = 8.0
"""Nobody waits longer for a shard to be empty before it is restarted."""
WISHES: Final = ("scale", "scale", "cordon", "pin", "restart")


def shard_number(name: str) -> int:
    """Of `shard-<n>`."""
    return int(name.partition("-")[2])


class People:
    """Who asks, and who starts and stops shards because of it.

    Args:
        world: the run.
        rng: chance of its own.
        burials_rng: of what dies for good.
    """

    def __init__(self, world: World, rng: random.Random, burials_rng: random.Random) -> None:
        self._burials = Burials(world, self, burials_rng)
        self._world = world
        self._rng = rng
        self._left: dict[str, ShardNode] = {}
        self._pace_s = rng.choice((0.7, 1.5, 3.0))
        self._tasks: list[asyncio.Task[None]] = []
        self.wishes = sorted(set(rng.sample(WISHES, rng.randrange(1, len(WISHES) + 1))) | {"pin"})

    @property
    def shards_left(self) -> list[ShardNode]:
        """Machines of shards that have left the ring."""
        return list(self._left.values())

    def begin(self) -> None:
        """Processes follow the ring from now on, and people ask."""
        self.also(self._follow())
        self.also(self._ask())
        self._burials.begin()

    def also(self, work: Coroutine[Any, Any, None]) -> None:
        """Somebody more who asks."""
        self._tasks.append(self._world.loop.create_task(work, name="people", context=self._world.context.copy()))

    def settle(self) -> None:
        """Nothing more is asked for; what is asked for now must come true."""
        for task in self._tasks[1:]:
            task.cancel()
        if self._rng.random() < 0.5:
            self._want(cordoned=())

    # --- what is asked for

    async def _ask(self) -> None:
        while True:
            await asyncio.sleep(self._rng.expovariate(1 / self._pace_s))
            self.wish()

    def wish(self) -> None:
        """Ask for something else than now."""
        wish = self._rng.choice(self.wishes)
        if wish == "scale":
            self.want_shards(self._rng.randrange(1, SHARDS_MAX + 1))
        elif wish == "cordon":
            self._cordon(self._somebody())
        elif wish == "pin":
            self._pin()
        else:
            self.also(self._restart(self._somebody()))

    def want_shards(self, shards: int) -> None:
        """`shards scale`."""
        self._want(shards=self._burials.shards_max(shards))

    def want_forgotten(self, words: tuple[Forgotten, ...]) -> None:
        """`shards forget`."""
        self._world.trace.add("people", "forgotten", str([(word.shard, word.volume_id) for word in words]))
        self._want(forgotten=words)

    def _want(self, **changes: object) -> None:
        spec = msgspec.structs.replace(self._world.control.view.spec, **changes)
        if spec != self._world.control.view.spec:
            words = f"{spec.shards} shards, cordoned {list(spec.cordoned)}, "
            self._world.trace.add("people", "want", words + f"pins {[(pin.first, pin.shard) for pin in spec.pins]}")
            self._world.control.set_spec(spec)

    def _somebody(self) -> ShardName:
        return ShardName(f"shard-{self._rng.randrange(self._world.control.view.spec.shards)}")

    def _cordon(self, name: ShardName) -> None:
        before = self._world.control.view.spec.cordoned
        left = tuple(each for each in before if each != name)
        self._want(cordoned=left if name in before else (*before, name))

    def _pin(self) -> None:
        """`move SLOTS --to`: mostly of slots that somebody writes to."""
        rng, spec = self._rng, self._world.control.view.spec
        slots = [self.slot_of(name) for name in self._world.sessions]
        first = rng.choice(slots) if rng.random() < 0.8 else Slot(rng.randrange(spec.slots))
        pins = tuple(pin for pin in spec.pins if pin.first != first)
        if rng.random() < 0.8:
            pins = (*pins, Pin(first, first, self._somebody()))
        self._want(pins=pins)

    def want_at(self, slot: Slot, name: ShardName) -> None:
        """`move SLOT --to SHARD`, and nothing else is wanted of it or of the shard."""
        spec = self._world.control.view.spec
        pins = (*(pin for pin in spec.pins if pin.first != slot), Pin(slot, slot, name))
        self._want(pins=pins, cordoned=tuple(each for each in spec.cordoned if each != name))

    def slot_of(self, session: str) -> Slot:
        """In this ring."""
        return slot_of(SessionId(session), self._world.control.view.spec.slots)

    def owner_and_others(self, slot: Slot) -> tuple[ShardName, list[ShardName]]:
        """Who has it, and the members who could."""
        ring = _map(self._world)
        owner = ring.owners()[slot].owner
        return owner, [each.name for each in ring.members if each.name != owner]

    async def _restart(self, name: ShardName) -> None:
        """`shards restart --handover`: empty it, restart it, let it come back."""
        control = self._world.control
        if name in control.view.spec.cordoned:
            return
        self._cordon(name)
        until_s = self._world.loop.time() + RESTART_S
        while any(found.owner == name for found in _map(self._world).ranges):
            if self._world.loop.time() > until_s:
                break
            await asyncio.sleep(0.1)
        for shard in self._world.shards:
            if shard.name == name:
                shard.signal(15)
        await asyncio.sleep(self._rng.uniform(0.0, 0.5))
        if name in control.view.spec.cordoned:
            self._cordon(name)

    # --- processes

    async def _follow(self) -> None:
        """As `cli/following.py`: those that are asked for, and members that have not left yet."""
        world = self._world
        while True:
            view = world.control.view
            members = () if view.map is None else view.map.members
            wanted = {f"shard-{number}" for number in range(view.spec.shards)} | {member.name for member in members}
            running = {shard.name for shard in world.shards}
            for name in sorted(wanted - running):
                self._come(name)
            for shard in list(world.shards):
                if shard.name not in wanted:
                    self._go(shard)
            for name, shard in self._left.items():
                # Not before nobody lives who could say it again.
                if shard.over and name in view.shards and name not in wanted:
                    world.control.forget(ShardName(name))
            await asyncio.sleep(FOLLOW_S)

    def _come(self, name: str) -> None:
        shard = self._left.get(name)
        if shard is None:
            shard = ShardNode(self._world, name)
        elif not shard.over:
            return  # it is still being stopped
        else:
            del self._left[name]
            shard.stopped = False
            self._burials.comes_again(shard)
            view = self._world.control.view
            known = name in view.shards or _map(self._world).member(ShardName(name)) is not None
            if not known and self._rng.random() < 0.5:
                shard.give_volume_away()
        self._world.shards.append(shard)
        self._world.shards.sort(key=lambda each: shard_number(each.name))
        shard.start()

    def _go(self, shard: ShardNode) -> None:
        self._world.trace.add("people", "left", shard.name)
        self._world.shards.remove(shard)
        self._left[shard.name] = shard
        self._burials.dead.pop(shard.name, None)
        shard.stopped = True
        shard.signal(15)
        self._world.later(STOP_S, lambda: shard.kill_all() if shard.stopped else None)

    # --- the judgement

    def at_rest(self) -> str:
        """What is left to do; nothing when each move ended and each slot is served by the one who should own it."""
        view, ring = self._world.control.view, _map(self._world)
        asked = [ShardName(f"shard-{number}") for number in range(view.spec.shards)]
        if ring.moves:
            return f"move {ring.moves[0].id} is in flight: {self._world.control.sentences[-1]}"
        members = [member.name for member in ring.members]
        eligible = [name for name in asked if name not in view.spec.cordoned]
        if eligible:  # else nobody may own anything: all stays where it is, and who has left stays a member
            if sorted(members) != sorted(asked):
                return f"{members} are members, {asked} are asked for"
            if complaint := _unlike(ring, eligible, view.spec.pins):
                return complaint
        newest = max(found.epoch for found in ring.ranges)
        for name in members:
            said, owned = view.shards.get(name), len(ring.slots_of(name))
            if said is None or said.epoch < newest or said.serves != owned:
                return f"{name} owns {owned} slots at epoch {newest} and says {said}"
        return ""


def _map(world: World) -> RingMap:
    ring = world.control.view.map
    assert ring is not None, "people begin when the ring serves"
    return ring


def _unlike(ring: RingMap, eligible: list[ShardName], pins: tuple[Pin, ...]) -> str:
    """Who owns what he should not; without pins everybody has his share, within one."""
    owners = [found.owner for found in ring.owners()]
    for slot, owner in enumerate(owners):
        if owner not in eligible:
            return f"{owner} owns slot {slot} and should own none"
    pinned = {int(pin.first): pin.shard for pin in pins if pin.shard in eligible}
    for slot, shard in pinned.items():
        if owners[slot] != shard:
            return f"slot {slot} is pinned to {shard} and {owners[slot]} owns it"
    counts = Counter(owners)
    shares = [counts[name] for name in eligible]
    if not pinned and max(shares) - min(shares) > 1:
        return f"shares are {shares}"
    return ""
