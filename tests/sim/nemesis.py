"""Who breaks things in a run: which faults, when and where, all from the seed.

Promise: a seed uses a few kinds of faults, at a rate of its own; `heal` ends all of them and leaves every machine
running. `may_lose` says whether some of them (rot) may lose messages, so that gaps are allowed: exactly then.
Must not be done here: how faults work (`disk.py`, `network.py`, `loop.py`, `control.py`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

from tests.sim.movefaults import MoveFaults

if TYPE_CHECKING:
    from tests.sim.loop import SimProcess
    from tests.sim.network import End
    from tests.sim.nodes import Node, ShardNode
    from tests.sim.world import World

KINDS_MAX: Final = 6
"""Kinds of faults in one run: with all of them at once nothing lives long enough to go wrong in an interesting way."""

PLOTS: Final = ("clock_restart", "crash_power", "late_elder", "slow_kill", "strike", "sync_power")
"""Kinds that meet by design what the others meet by chance: half of all runs have one of them for certain."""
PLOT_S: Final = 6.0
"""Seconds that plots get to end when nothing new is broken any more."""


class Nemesis:
    """The faults of one run.

    Args:
        world: the run.
        moves_rng: chance of what is about moves.
    """

    def __init__(self, world: World, moves_rng: random.Random) -> None:
        self._world = world
        self._moves_rng = moves_rng
        self._move_faults = MoveFaults(world, moves_rng)
        rng = world.rng
        table = self._table()
        names = sorted(table)
        chosen = rng.sample(names, rng.randrange(0, KINDS_MAX + 1))
        if rng.random() < 0.5:
            chosen.append(rng.choice(PLOTS))
        self.kinds = sorted(set(chosen))
        self._plots: list[asyncio.Task[None]] = []
        self._acts = [(name, table[name]) for name in self.kinds]
        self.may_lose = "flip" in self.kinds
        self.duration_s = rng.choice((1.0, 2.0, 4.0, 8.0))
        self.pace_s = rng.choice((0.1, 0.3, 0.8))
        self._strikes_amid_moves = 0
        if world.people is not None:
            self.duration_s = moves_rng.choice((3.0, 5.0, 8.0))
            self._strikes_amid_moves = moves_rng.choice((0, 1, 1, 2, 4))
            if world.moment == "scarce":
                self._strikes_amid_moves = 0  # they would strike the very moves that are asked for
            # Faults at random are fewer: with all of them at once no move comes far.
            self._acts = self._acts[: moves_rng.randrange(0, 4)]
            self.kinds = [name for name, _ in self._acts]
            self.pace_s = max(self.pace_s, moves_rng.choice((0.3, 1.0)))
            self.may_lose = "flip" in self.kinds
        world.network.latency_s = rng.choice((0.0002, 0.001, 0.01))
        world.network.fragments = rng.choice((0.0, 0.1, 0.6))
        world.trace.add("nemesis", "faults", " ".join(self.kinds))

    def _table(self) -> dict[str, Callable[[], None]]:
        return {
            "away": self._away,
            "clock": self._clock,
            "clock_restart": self._clock_restart,
            "crash_op": self._crash_op,
            "crash_power": self._crash_power,
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
            "late_elder": self._late_elder,
            "partition": self._partition,
            "power": self._power,
            "slow_disk": self._slow_disk,
            "slow_kill": self._slow_kill,
            "stale": self._stale,
            "strike": self._strike,
            "sync_fails": self._sync_fails,
            "sync_power": self._sync_power,
            "younger": self._younger,
        }

    async def rage(self) -> None:
        """Break things for a while."""
        rng, loop = self._world.rng, self._world.loop
        until_s = loop.time() + self.duration_s
        for _ in range(self._strikes_amid_moves):
            self._plot(self._move_faults.plot())
        if people := self._world.people:
            self._move_faults.ask(people)
        while loop.time() < until_s:
            await asyncio.sleep(min(rng.expovariate(1 / self.pace_s), max(0.0, until_s - loop.time()) + 0.001))
            self._act()
        # The last blow: what hangs because of it must come loose by itself.
        if rng.random() < 0.5:
            self._act()
            await asyncio.sleep(rng.uniform(0.0, 0.3))
        if rng.random() < 0.7:
            await self._plots_end()

    async def _plots_end(self) -> None:
        if playing := [plot for plot in self._plots if not plot.done()]:
            await asyncio.wait(playing, timeout=PLOT_S)

    def _act(self) -> None:
        playing = any(not plot.done() for plot in self._plots)
        if self._acts and not (playing and self._world.rng.random() < 0.6):
            name, act = self._world.rng.choice(self._acts)
            self._world.trace.add("nemesis", name)
            act()

    def heal(self) -> None:
        """End every fault."""
        world = self._world
        for plot in self._plots:
            plot.cancel()
        world.network.latency_s = 0.0005
        world.network.strike_in = None
        world.network.heal()
        world.trace.told.clear()
        world.weather.clear()
        for shard in [*world.shards, *(world.people.shards_left if world.people is not None else ())]:
            shard.drive.calm()
            shard.when_frozen = None
        for process in list(world.processes):
            process.thaw()

    # --- the faults

    def _shard(self) -> ShardNode:
        return self._world.rng.choice(self._world.shards)

    def _pair(self) -> tuple[str, str]:
        world, rng = self._world, self._world.rng
        gateway = rng.choice(world.gateways).name
        other: Node = rng.choice([*world.shards, *world.clients])
        if world.people is not None and self._moves_rng.random() < 0.3:
            gateway = self._moves_rng.choice(world.shards).name
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
        drive = self._shard().drive
        drive.freeze_in, drive.freeze_writes_only = self._world.rng.randrange(1, 12), False

    def _sync_fails(self) -> None:
        drive, rng = self._shard().drive, self._world.rng
        drive.fail_sync_in, drive.fail_writer_only = rng.randrange(1, 8), rng.random() < 0.5

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
        if elder is None or elder.dead or shard.crowded:
            return
        if rng.random() < 0.8:
            elder.freeze()
            world.later(
                (rng.choice((0.3, 2.0)) + rng.choice((0, shard.takeover_s))) * rng.uniform(0.7, 1.3), elder.thaw
            )
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
        self._world.later(rng.uniform(0.2, 3.0), lambda: setattr(drive, "latency_s", drive.usual_latency_s))

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

    # --- plots: faults that mean something only one after the other

    def _plot(self, work: Coroutine[Any, Any, None]) -> None:
        """Play it until the healing begins."""
        self._plots.append(self._world.loop.create_task(work, name="plot", context=self._world.context.copy()))

    def _strike(self) -> None:
        """Something happens exactly when bytes are under way: a cut, or the death of one who talks."""
        network, rng = self._world.network, self._world.rng
        network.strike_in = rng.randrange(1, 60)
        act = rng.choice((lambda end: end.connection.cut(), lambda end: end.process.kill(), self._kill_receiver))
        network.strike = act

    def _kill_receiver(self, end: End) -> None:
        end.peer.process.kill()

    def _slow_kill(self) -> None:
        """A shard dies while much waits for its slow disk."""
        world, rng, shard = self._world, self._world.rng, self._shard()
        shard.drive.latency_s = rng.choice((0.05, 0.3))

        async def plot() -> None:
            await asyncio.sleep(rng.uniform(0.05, 1.0))
            shard.kill()
            shard.drive.latency_s = shard.drive.usual_latency_s
            world.trace.add("nemesis", "slow_killed", shard.name)

        self._plot(plot())

    def _clock_restart(self) -> None:
        """A wall clock is set, then the process dies in the middle of its work: the next one reads with that clock."""
        shard, rng = self._shard(), self._world.rng
        shard.clock.step_s += rng.choice((-3600.0, 3600.0, 3600.0))
        shard.drive.crash_in = rng.randrange(1, 30)

    def _sync_power(self) -> None:
        """A sync fails, and soon the power: what the kernel took for clean is gone."""
        shard, rng = self._shard(), self._world.rng
        shard.drive.fail_sync_in, shard.drive.fail_writer_only = rng.randrange(1, 4), True

        async def plot() -> None:
            while shard.drive.fail_sync_in is not None:  # noqa: ASYNC110  operations have no events
                await asyncio.sleep(0.01)
            await asyncio.sleep(rng.choice((0.0, 0.1, 0.5)))
            shard.power_loss()

        self._plot(plot())

    def _crash_power(self) -> None:
        """A process dies before its batch is synced, the next one reads it out of the cache, then the power fails."""
        shard, rng = self._shard(), self._world.rng
        shard.drive.crash_in = rng.randrange(1, 25)

        async def plot() -> None:
            while shard.drive.crash_in is not None or not shard.ready:  # noqa: ASYNC110  as above
                await asyncio.sleep(0.002)
            shard.drive.power_in = rng.randrange(1, 10)

        self._plot(plot())

    def _late_elder(self) -> None:
        """An elder stands still inside a batch until a younger one has its volume, goes on, and the younger one dies.

        Gateways hear late of the younger one: they would listen to the elder.
        """
        world, rng, shard = self._world, self._world.rng, self._shard()
        if shard.crowded or not shard.ready:
            return
        shard.drive.freeze_in, shard.drive.freeze_writes_only = rng.randrange(1, 4), rng.random() < 0.7
        late_s, lived_s = rng.choice((0.0, 0.0, 0.3)) * rng.random(), rng.uniform(0.05, 1.5)

        async def plot(elder: SimProcess) -> None:
            if rng.random() < 0.9:
                world.weather.away.update((gateway.name, True) for gateway in world.gateways)
            shard.start_younger()
            while shard.process is elder or not shard.ready:  # noqa: ASYNC110  as above
                await asyncio.sleep(0.01)
            younger = shard.process
            await asyncio.sleep(late_s)
            elder.thaw()
            await asyncio.sleep(lived_s)
            world.weather.away.clear()
            if younger is not None:
                younger.kill()

        shard.when_frozen = lambda elder: self._plot(plot(elder))
