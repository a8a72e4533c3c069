"""A spell in which nobody writes: keys leave their window, copies of slots that moved away are compacted.

Place: between the last write and the last read, in some of the runs in which slots move. Promise: what strikes then
is over at its end; mostly it strikes in the middle of a compaction. Must not be done here: judging.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from tests.sim.nodes import ShardNode

if TYPE_CHECKING:
    from tests.sim.world import World

RESTING: Final = 0.3
"""Part of the runs in which slots move."""
SETTINGS: Final[dict[str, Any]] = {
    "file_bytes": 45 * 1024,
    "round_bytes": 20 * 1024,
    "clean_after_s": 0.5,
    "keys_window_s": 15.0,
}
"""Of shards: what moved away is void soon, and keys are known no longer than they must."""
REST_S: Final = (40.0, 55.0)
"""The window, two checkpoints (10 s apart at most), and a segment a second after that."""
BOOTED_S: Final = (14.0, 38.0)
"""When strikes begin."""


class Rest:
    """One spell.

    Args:
        world: the run.
        rng: chance of its own.
    """

    def __init__(self, world: World, rng: random.Random) -> None:
        self._world = world
        self._rng = rng
        self._strikes: tuple[Callable[[ShardNode], object], ...] = (
            self._crash,
            self._crash,
            self._power,
            self._power,
            self._younger,
            self._full,
            ShardNode.kill,
            ShardNode.power_loss,
        )

    async def run(self) -> None:
        """Live through it."""
        world, rng, loop = self._world, self._rng, self._world.loop
        begun_s = loop.time()
        strikes = sorted(rng.uniform(*BOOTED_S) for _ in range(rng.choice((0, 1, 2, 4))))
        for at_s in strikes:
            await asyncio.sleep(max(0.0, begun_s + at_s - loop.time()))
            strike, shard = rng.choice(self._strikes), rng.choice(world.shards)
            world.trace.add("rest", getattr(strike, "__name__", "").strip("_"), shard.name)
            strike(shard)
        await asyncio.sleep(max(0.0, begun_s + rng.uniform(*REST_S) - loop.time()))
        world.trace.add("rest", "heal")
        world.nemesis.heal()

    def _crash(self, shard: ShardNode) -> None:
        """Before a segment or its index gets its new file."""
        shard.drive.only, shard.drive.crash_in = frozenset({"replace"}), self._rng.randrange(1, 5)

    def _power(self, shard: ShardNode) -> None:
        """At such a moment, or before what follows."""
        shard.drive.only = frozenset({"replace", "sync_folder"})
        shard.drive.power_in = self._rng.randrange(1, 8)

    def _younger(self, shard: ShardNode) -> None:
        """Another container boots while the first one stands still, which then goes on."""
        shard.overtake(lambda: shard.takeover_s * self._rng.uniform(0.3, 1.5))

    def _full(self, shard: ShardNode) -> None:
        volume = shard.drive.volume
        volume.capacity_bytes = volume.used_bytes() + self._rng.choice((0, 4096, 30_000))
