"""A shard that gave everything away and is dead for good before it could say so; people have the ring forget it.

    scaled down ─► its last slot is committed to another ─► it dies with its volume, or stands still for long
    people name its volume, at first sometimes another one ─► the ring goes on without it ─► the name may come again

Promise: only members that own nothing are struck here, as nothing else could be forgotten; one that stood still may go
on at any moment, also after it was forgotten. Must not be done here: other faults (`nemesis.py`, `movefaults.py`).
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Final

from fleetlm_common.control import Forgotten
from fleetlm_common.ids import ShardName

if TYPE_CHECKING:
    from fleetlm_common.ring import RingMap
    from tests.sim.nodes import ShardNode
    from tests.sim.people import People
    from tests.sim.world import World

BURIALS: Final = 0.4
"""Part of the runs with moves in which a shard dies for good."""


class Burials:
    """What dies for good in a run, and what people say of it.

    Args:
        world: the run.
        people: who scale and say it.
        rng: chance of its own: other runs stay the same.

    Attributes:
        dead: shards that are not started any more, each until the ring has forgotten it.
    """

    def __init__(self, world: World, people: People, rng: random.Random) -> None:
        self._world = world
        self._people = people
        self._rng = rng
        self.dead: dict[str, Forgotten] = {}
        self._without_volume: set[str] = set()

    def begin(self) -> None:
        """In some runs."""
        if self._rng.random() < BURIALS:
            self._people.also(self._strike())

    async def _strike(self) -> None:
        await asyncio.sleep(self._rng.uniform(0.2, 1.5))
        shards = max(self._world.control.view.spec.shards, 2)
        self._people.want_shards(shards)
        while (found := self._last_gone(self._ring())) is None:
            if self._world.control.view.spec.shards >= shards and self._has_share(shards):
                self._people.want_shards(shards - 1)
            await self._world.control.seen("committed")
        self._dies(found)

    def _ring(self) -> RingMap:
        ring = self._world.control.view.map
        assert ring is not None, "people begin when the ring serves"
        return ring

    def _has_share(self, shards: int) -> bool:
        return any(found.owner == f"shard-{shards - 1}" for found in self._ring().ranges)

    def _last_gone(self, ring: RingMap) -> ShardNode | None:
        """Who is not asked for and has just given its last slot away."""
        asked = {f"shard-{number}" for number in range(self._world.control.view.spec.shards)}
        owners = {found.owner for found in ring.ranges} | {move.target for move in ring.moves}
        gone = [each.name for each in ring.members if each.name not in asked and each.name not in owners]
        return next((shard for shard in self._world.shards if shard.name in gone and not shard.stopped), None)

    def _dies(self, shard: ShardNode) -> None:
        member = self._ring().member(ShardName(shard.name))
        assert member is not None
        rng, world, process = self._rng, self._world, shard.process
        word = self.dead[shard.name] = Forgotten(member.name, member.volume_id)
        shard.stopped = True
        if rng.random() < 0.5 and process is not None and process.state == "running":
            world.trace.add("burials", "stands_still", shard.name)
            process.freeze()
            world.later(rng.choice((10.0, 25.0, 27.0)) * rng.uniform(0.8, 1.2), process.thaw)
        else:
            world.trace.add("burials", "dies", shard.name)
            shard.kill_all()
            shard.give_volume_away()
            self._without_volume.add(shard.name)
        said_s = rng.uniform(0.1, 4.0)
        if rng.random() < 0.3:
            world.later(said_s / 2, lambda: self._say(Forgotten(member.name, "another")))
        world.later(said_s, lambda: self._say(word))

    def _say(self, word: Forgotten) -> None:
        """As the command does: of a member only."""
        spec, member = self._world.control.view.spec, self._ring().member(word.shard)
        if member is None or word.shard not in self.dead:
            return
        self._people.want_forgotten((*spec.forgotten, word))

    def comes_again(self, shard: ShardNode) -> None:
        """Its name is asked for: with an empty volume, or people were wrong about the old one and say so."""
        spec = self._world.control.view.spec
        words = tuple(each for each in spec.forgotten if each.shard == shard.name)
        if words and (shard.name in self._without_volume or self._rng.random() < 0.5):
            self._without_volume.discard(shard.name)
            shard.give_volume_away()
        elif words:
            self._people.want_forgotten(tuple(each for each in spec.forgotten if each not in words))

    def shards_max(self, wanted: int) -> int:
        """Nobody asks for a shard that cannot come: the ring has to forget it first."""
        return min([wanted, *(int(name.partition("-")[2]) for name in self.dead)])
