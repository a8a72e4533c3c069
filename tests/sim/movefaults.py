"""Faults that mean something only in the middle of a move: who dies, stands still or is cut off, and at which step.

Promise: each waits for a step of a real move, strikes soon after it (often at once), and is over when the healing
begins. Must not be done here: how faults work (`disk.py`, `network.py`, `loop.py`, `control.py`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from tests.sim.control import STEPS

if TYPE_CHECKING:
    from fleetlm_common.ring import Move
    from tests.sim.nodes import Node, ShardNode
    from tests.sim.people import People
    from tests.sim.workload import Asked
    from tests.sim.world import World

LATE_S: Final = (0.0, 0.0, 0.005, 0.03, 0.15, 0.5)
"""After the step: the map is on its way to shards and gateways, then records to disks, then words to the controller."""
STILL_S: Final = (0.3, 2.0, 4.0)
"""Shorter and longer than a seal may last."""


class MoveFaults:
    """Strikes amid moves.

    Args:
        world: the run.
        rng: chance of its own.
    """

    def __init__(self, world: World, rng: random.Random) -> None:
        self._world = world
        self._rng = rng
        self._strikes: list[Callable[[Move], None]] = [
            self._kill,
            self._kill,
            self._power,
            self._freeze,
            self._crash_op,
            self._sync_fails,
            self._full,
            self._younger,
            self._late_elder,
            self._apart,
            self._unheard,
            self._late_map,
            self._controllers,
            self._mind,
        ]

    async def plot(self) -> None:
        """Wait for a step, and strike."""
        rng = self._rng
        step = rng.choice(STEPS[:3]) if rng.random() < 0.9 else STEPS[3]
        move = await self._world.control.seen(step)
        if late_s := rng.choice(LATE_S) * rng.uniform(0.5, 1.5):
            await asyncio.sleep(late_s)
        strike = rng.choice(self._strikes)
        self._world.trace.add("nemesis", "amid_move", f"{strike.__name__.strip('_')}, {move.id} {step}")
        strike(move)

    # --- moves that people ask for at the worst moment

    def ask(self, people: People) -> None:
        """Let them, in some runs."""
        if self._world.moment == "back":
            people.also(self._there_and_back(people, self._world.moment_rng))
        elif self._world.moment == "scarce":
            people.also(self._away_while_writers_wait(people, self._world.moment_rng))

    async def _there_and_back(self, people: People, rng: random.Random) -> None:
        """A slot goes, and comes back while its old shard cleans up, whose record a slow disk holds up."""
        world = self._world
        await asyncio.sleep(rng.uniform(0.2, 1.0))
        slot = people.slot_of(rng.choice(world.sessions))
        name, others = people.owner_and_others(slot)
        if not others:
            return
        people.want_at(slot, rng.choice(others))

        def back(process: str) -> None:
            shard = next((shard for shard in world.shards if shard.name == name), None)
            if shard is None or process != f"{name}/{shard.lives}":
                return
            del world.trace.told["slots.released"]
            shard.drive.round_s = rng.uniform(0.2, 1.5)
            world.later(1.5, lambda: setattr(shard.drive, "round_s", 0.0))
            people.want_at(slot, name)

        world.trace.told["slots.released"] = back

    async def _away_while_writers_wait(self, people: People, rng: random.Random) -> None:
        """Slots go while what was written to them waits, mostly for a segment whose preparation takes long."""
        before: list[Asked] = []
        while True:
            await asyncio.sleep(0.2)
            asked = [asked for client in self._world.clients for asked in client.pending]
            waiting = [each for each in asked if any(each is other for other in before)]
            before = asked
            if waiting:
                slot = people.slot_of(waiting[0].invocation.session)
                _, others = people.owner_and_others(slot)
                if others:
                    people.want_at(slot, rng.choice(others))
                await asyncio.sleep(1.5)

    # --- who

    def _shards(self, move: Move) -> list[ShardNode]:
        """Source, then target, as far as they are there."""
        here = {shard.name: shard for shard in self._world.shards}
        return [here[name] for name in (move.source, move.target) if name in here]

    def _one(self, move: Move) -> ShardNode:
        return self._rng.choice(self._shards(move) or self._world.shards)

    def _later(self, node_after_s: float, act: Callable[[], object]) -> None:
        self._world.later(node_after_s * self._rng.uniform(0.7, 1.3), act)

    # --- strikes

    def _kill(self, move: Move) -> None:
        victims: list[Node] = list(self._shards(move))
        if self._rng.random() < 0.7:
            victims = [self._rng.choice([*victims, *self._world.controllers, *self._world.gateways])]
        for victim in victims:
            victim.kill()

    def _power(self, move: Move) -> None:
        shards = self._shards(move)
        for shard in shards if self._rng.random() < 0.3 else [self._one(move)]:
            shard.power_loss()

    def _freeze(self, move: Move) -> None:
        process = self._one(move).process
        if process is not None and process.state == "running":
            process.freeze()
            self._later(self._rng.choice(STILL_S), process.thaw)

    def _crash_op(self, move: Move) -> None:
        """Before one of its next file operations: SEALED, CONFIRMED, OPENED, the stored map."""
        self._one(move).drive.crash_in = self._rng.randrange(1, 12)

    def _sync_fails(self, move: Move) -> None:
        drive = self._one(move).drive
        drive.fail_sync_in, drive.fail_writer_only = self._rng.randrange(1, 4), True

    def _full(self, move: Move) -> None:
        """The target has no room for what is brought."""
        volume = self._shards(move)[-1].drive.volume if self._shards(move) else self._one(move).drive.volume
        volume.capacity_bytes = volume.used_bytes() + self._rng.choice((0, 4096, 100_000))
        self._later(self._rng.choice(STILL_S), lambda: setattr(volume, "capacity_bytes", 1 << 40))

    def _younger(self, move: Move) -> None:
        """Another container of source or target boots while the first one stands still, which then goes on."""
        shard = self._one(move)
        rng = self._rng
        shard.overtake(lambda: (rng.choice((0.3, 2.0)) + rng.choice((0, shard.takeover_s))) * rng.uniform(0.7, 1.3))

    def _late_elder(self, move: Move) -> None:
        """It stands still inside a batch: the drive lets a younger one boot meanwhile."""
        self._one(move).drive.freeze_in = self._rng.randrange(1, 6)

    def _apart(self, move: Move) -> None:
        """Source and target do not reach each other."""
        network, left, right = self._world.network, str(move.source), str(move.target)
        network.block(left, right)
        if self._rng.random() < 0.5:
            for connection in network.between(left, right):
                connection.cut()
        self._later(self._rng.choice(STILL_S), lambda: network.heal_pair(left, right))

    def _unheard(self, move: Move) -> None:
        """The control plane is away for one of them, for both, or for everybody."""
        away = self._world.weather.away
        nodes = self._world.nodes if self._rng.random() < 0.3 else [self._one(move)]
        away.update((node.name, True) for node in nodes)
        self._later(self._rng.choice(STILL_S), away.clear)

    def _late_map(self, move: Move) -> None:
        """Gateways, or one of the shards, hear late of what happens now."""
        stale_s, world = self._world.weather.stale_s, self._world
        nodes: list[Node] = list(world.gateways) if self._rng.random() < 0.5 else [self._one(move)]
        stale_s.update((node.name, self._rng.choice((0.3, 1.0, 3.0))) for node in nodes)
        self._later(3.0, stale_s.clear)

    def _controllers(self, move: Move) -> None:
        """A controller stands still between its look and its act, and acts by an old look."""
        del move
        for node in self._world.controllers:
            process = node.process
            if process is not None and process.state == "running" and self._rng.random() < 0.7:
                process.freeze()
                self._later(self._rng.choice(STILL_S), process.thaw)
        self._world.weather.lost_answers = 0.3

    def _mind(self, move: Move) -> None:
        """People change their mind."""
        del move
        if self._world.people is not None:
            self._world.people.wish()
