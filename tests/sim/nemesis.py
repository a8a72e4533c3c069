"""Who breaks things in a run: which faults, when and where, all from the seed.

Promise: a seed uses a few kinds of faults, at a rate of its own; `heal` ends all of them and leaves every machine
running. `may_lose` says whether some of them (rot) may lose messages, so that gaps are allowed: exactly then.
Must not be done here: how faults work (`disk.py`, `network.py`, `loop.py`, `control.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tests.sim.nodes import Node, ShardNode
    from tests.sim.world import World

KINDS_MAX: Final = 5
"""Kinds of faults in one run: with all of them at once nothing lives long enough to go wrong in an interesting way."""

YOUNGER_MAX: Final = 2
"""Processes of one shard at once beside its newest: more only wait for each other."""


class Nemesis:
    """The faults of one run.

    Args:
        world: the run.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        rng = world.rng
        table = self._table()
        names = sorted(table)
        chosen = rng.sample(names, rng.randrange(0, KINDS_MAX + 1))
        self.kinds = sorted(chosen)
        self._acts = [(name, table[name]) for name in self.kinds]
        self.may_lose = "flip" in self.kinds
        self.duration_s = rng.choice((1.0, 2.0, 4.0, 8.0))
        self.pace_s = rng.choice((0.1, 0.3, 0.8))
        world.network.latency_s = rng.choice((0.0002, 0.001, 0.01))
        world.network.fragments = rng.choice((0.0, 0.1, 0.6))
        world.trace.add("nemesis", "faults", " ".join(self.kinds))

    def _table(self) -> dict[str, Callable[[], None]]:
        return {
            "away": self._away,
            "clock": self._clock,
            "crash_op": self._crash_op,
            "cut": self._cut,
            "drain": self._drain,
            "flip": self._flip,
            "freeze": self._freeze,
            "freeze_op": self._freeze_op,
            "full": self._full,
            "half_open": self._half_open,
            "kill_client": self._kill_client,
            "kill_controller": self._kill_controller,
            "kill_gateway": self._kill_gateway,
            "kill_shard": self._kill_shard,
            "partition": self._partition,
            "power": self._power,
            "slow_disk": self._slow_disk,
            "stale": self._stale,
            "sync_fails": self._sync_fails,
            "younger": self._younger,
        }

    async def rage(self) -> None:
        """Break things for a while."""
        rng, loop = self._world.rng, self._world.loop
        until_s = loop.time() + self.duration_s
        while loop.time() < until_s:
            await asyncio.sleep(min(rng.expovariate(1 / self.pace_s), max(0.0, until_s - loop.time()) + 0.001))
            if self._acts:
                name, act = rng.choice(self._acts)
                self._world.trace.add("nemesis", name)
                act()

    def heal(self) -> None:
        """End every fault."""
        world = self._world
        world.network.latency_s = 0.0005
        world.network.heal()
        world.weather.clear()
        for shard in world.shards:
            drive = shard.drive
            drive.crash_in = drive.freeze_in = drive.fail_sync_in = None
            drive.latency_s = 0.0008
            drive.volume.capacity_bytes = 1 << 40
        for process in list(world.processes):
            process.thaw()

    # --- the faults

    def _shard(self) -> ShardNode:
        return self._world.rng.choice(self._world.shards)

    def _pair(self) -> tuple[str, str]:
        world, rng = self._world, self._world.rng
        gateway = rng.choice(world.gateways).name
        other: Node = rng.choice([*world.shards, *world.clients])
        return gateway, other.name

    def _kill_shard(self) -> None:
        self._shard().kill()

    def _kill_gateway(self) -> None:
        self._world.rng.choice(self._world.gateways).kill()

    def _kill_client(self) -> None:
        self._world.rng.choice(self._world.clients).kill()

    def _kill_controller(self) -> None:
        self._world.rng.choice(self._world.controllers).kill()

    def _drain(self) -> None:
        self._world.rng.choice([*self._world.shards, *self._world.gateways]).signal(15)

    def _power(self) -> None:
        self._shard().power_loss()

    def _crash_op(self) -> None:
        self._shard().drive.crash_in = self._world.rng.randrange(1, 60)

    def _freeze_op(self) -> None:
        self._shard().drive.freeze_in = self._world.rng.randrange(1, 12)

    def _sync_fails(self) -> None:
        self._shard().drive.fail_sync_in = self._world.rng.randrange(1, 8)

    def _freeze(self) -> None:
        world, rng = self._world, self._world.rng
        node: Node = rng.choice([*world.shards, *world.gateways, *world.controllers, *world.clients])
        process = node.process
        if process is not None and process.state == "running":
            process.freeze()
            world.later(rng.choice((0.05, 0.5, 3.0, 6.0)) * (0.5 + rng.random()), process.thaw)

    def _younger(self) -> None:
        """The elder is frozen, a younger one boots on its volume, the elder goes on."""
        world, rng, shard = self._world, self._world.rng, self._shard()
        elder = shard.process
        living = [process for process in shard.drive.processes.values() if not process.dead]
        if elder is None or elder.dead or len(living) > YOUNGER_MAX:
            return
        if rng.random() < 0.8:
            elder.freeze()
            world.later(rng.choice((0.3, 2.0, 12.0, 14.0)) * (0.7 + rng.random() * 0.6), elder.thaw)
        shard.start_younger()

    def _cut(self) -> None:
        connections = self._world.network.connections
        if connections:
            self._world.rng.choice(connections).cut()

    def _half_open(self) -> None:
        connections = self._world.network.connections
        if connections:
            self._world.rng.choice(connections).half_open()

    def _partition(self) -> None:
        world, rng = self._world, self._world.rng
        left, right = self._pair()
        world.network.block(left, right)
        world.trace.add("net", "partition", f"{left} {right}")
        world.later(rng.choice((0.1, 1.0, 5.0)) * (0.5 + rng.random()), lambda: world.network.heal_pair(left, right))

    def _slow_disk(self) -> None:
        drive, rng = self._shard().drive, self._world.rng
        drive.latency_s = rng.choice((0.01, 0.1, 0.6))
        self._world.later(rng.uniform(0.2, 3.0), lambda: setattr(drive, "latency_s", 0.0008))

    def _full(self) -> None:
        volume, rng = self._shard().drive.volume, self._world.rng
        volume.capacity_bytes = volume.used_bytes() + rng.choice((0, 4096, 100_000, 300_000))
        self._world.later(rng.uniform(0.2, 5.0), lambda: setattr(volume, "capacity_bytes", 1 << 40))

    def _flip(self) -> None:
        """Rot in a segment that is not the newest: all of it is on disk and known to be."""
        volume, rng = self._shard().drive.volume, self._world.rng
        segments = [path for path in volume.paths() if path.endswith(".seg")][:-1]
        if segments:
            path = rng.choice(segments)
            offset = rng.randrange(len(volume.read(path)))
            self._world.trace.add("nemesis", "flipped", f"{path} {offset}")
            volume.flip(path, offset, 1 << rng.randrange(8))

    def _clock(self) -> None:
        node = self._world.rng.choice([*self._world.shards, *self._world.gateways, *self._world.clients])
        node.clock.step_s += self._world.rng.choice((-3600.0, -5.0, -0.5, 0.5, 5.0, 3600.0))

    def _away(self) -> None:
        world, rng = self._world, self._world.rng
        machines = [node.name for node in world.nodes] if rng.random() < 0.5 else [rng.choice(world.nodes).name]
        for machine in machines:
            world.weather.away[machine] = True
        world.later(rng.uniform(0.3, 6.0), world.weather.away.clear)

    def _stale(self) -> None:
        world, rng = self._world, self._world.rng
        world.weather.stale_s[rng.choice([*world.gateways, *world.shards]).name] = rng.choice((0.5, 3.0))
        world.weather.lost_answers = 0.3
