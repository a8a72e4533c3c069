"""Boot of a shard, in the order that the fence needs (design §6): take the volume, read the ring map, read the log.

    spec → take volume (term durable) → map, stored → read log, rebuild, cut, look → serve

Promise: nothing is served before all of it is done; a volume that the map does not bind to this shard is never served
from, however often the process starts. Each wait says for what (`Stage`). Must not be done here: listening, signals.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fleetlm_common.control import ControlPlane, ControlPlaneUnavailable, View
from fleetlm_common.ids import ShardName
from fleetlm_common.ops import Health
from fleetlm_common.ring import is_restored
from fleetlm_shard.identity import read_identity
from fleetlm_shard.ownership import lost_volume
from fleetlm_shard.rebuild import Rebuilt, rebuild
from fleetlm_shard.recovery import LogBoot
from fleetlm_shard.shard import Memory
from fleetlm_shard.stored_map import choose_map
from fleetlm_shard.volume import Volume, keep_term, take_volume
from fleetlm_shard.volume_types import Identity, MapUnavailable, StaleMap

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Coroutine

    from fleetlm_common.clock import Clock
    from fleetlm_common.logs import Logger
    from fleetlm_common.ring import RingMap
    from fleetlm_shard.config import ShardConfig
    from fleetlm_shard.disk import Disk
    from fleetlm_shard.recovery import LogStart
    from fleetlm_shard.volume_types import StoredMap

RETRY_S: Final = 0.5
"""Between two tries of something that only the outside can mend."""
STARTING: Final = Health(ok=False, reason="Starting", message="the process has just begun")


@dataclass(frozen=True, slots=True, kw_only=True)
class BootInputs:
    """What a boot gets from outside."""

    config: ShardConfig
    disk: Disk
    control: ControlPlane
    clock: Clock
    entropy: random.Random
    sleep: Callable[[float], Awaitable[None]]
    events: Logger
    new_volume_id: str
    """Used only if the volume is empty."""
    boot_id: str
    keep: Callable[[Coroutine[None, None, None]], None]
    """Runs `keep_term` beside everything else until the process ends."""
    announce: Callable[[Volume], Awaitable[None]]
    """Says which volume is here although nothing is served from it: people may give up the one that should be."""


@dataclass(frozen=True, slots=True)
class Booted:
    """All that a shard begins with."""

    volume: Volume
    slots: int
    ring: RingMap | None
    memory: Memory
    rebuilt: Rebuilt
    start: LogStart


class Boot:
    """One boot.

    Attributes:
        stage: what is being waited for, as readiness.
    """

    def __init__(self, inputs: BootInputs) -> None:
        self._inputs = inputs
        self.stage = STARTING

    async def run(self) -> Booted:
        """Do it; waits as long as the outside needs.

        Raises:
            ForeignVolume, VolumeUnreadable, LogUnreadable: a person must look; nothing was harmed.
            VolumeError, OSError: the disk refuses; end the process.
        """
        inputs = self._inputs
        ring_uid, slots = await self._spec()
        volume = await self._take(ring_uid)
        inputs.keep(keep_term(volume, sleep=inputs.sleep))
        ring = await self._map(volume)
        if slots == 0:
            assert ring is not None, "a boot without control plane goes by a stored map"
            slots = ring.slots
        self._say("ReadingLog", "the log's end is being read")
        memory, rebuilt, start = await asyncio.to_thread(self._read_log, volume, slots, ring)
        # An elder may have sealed or confirmed between our two looks: its log then tells of a newer map than we read.
        while ring is None or ring.epoch < rebuilt.holdings.epoch:
            if not rebuilt.holdings.epoch:
                break
            self._say("StaleMap", f"the log acted upon ring map epoch {rebuilt.holdings.epoch}, this one is older")
            await inputs.sleep(RETRY_S)
            ring = await self._map(volume)
        return Booted(volume, slots, ring, memory, rebuilt, start)

    def _say(self, reason: str, message: str) -> None:
        if (self.stage.reason, self.stage.message) != (reason, message):
            self.stage = Health(ok=False, reason=reason, message=message)
            self._inputs.events.event("boot.stage", reason=reason, why=message)

    async def _view(self) -> View | None:
        try:
            return await self._inputs.control.read()
        except ControlPlaneUnavailable as error:
            self._inputs.events.event("control.away", level="warning", error=str(error))
            return None

    async def _spec(self) -> tuple[str, int]:
        """The ring's uid and slots; from the volume's own identity (slots unknown: 0) if the control plane is away."""
        while True:
            view = await self._view()
            if view is not None:
                return view.spec.uid, view.spec.slots
            identity = await asyncio.to_thread(read_identity, self._inputs.disk)
            if identity is not None:
                return identity.ring_uid, 0
            self._say("ControlPlaneAway", "the control plane does not answer and the volume is empty")
            await self._inputs.sleep(RETRY_S)

    async def _take(self, ring_uid: str) -> Volume:
        inputs = self._inputs
        self._say("TakingVolume", "the volume is being taken; its last owner may still have to leave")
        return await take_volume(
            inputs.disk,
            identity=Identity(ring_uid=ring_uid, shard=ShardName(inputs.config.name), volume_id=inputs.new_volume_id),
            pod_uid=inputs.config.pod_uid,
            boot_id=inputs.boot_id,
            clock=inputs.clock,
            sleep=inputs.sleep,
            log=inputs.events,
            takeover_after_s=inputs.config.takeover_after_s,
        )

    async def _map(self, volume: Volume) -> RingMap | None:
        """The map to boot with, stored on the volume; None if the ring has none yet. Read after the term is durable."""
        while True:
            view = await self._view()
            stored = await asyncio.to_thread(volume.stored_map)
            if view is not None and view.map is None and stored is None:
                return None
            try:
                ring = choose_map(
                    None if view is None else view.map,
                    stored,
                    identity=volume.identity,
                    pod_uid=self._inputs.config.pod_uid,
                )
            except StaleMap as error:
                self._say("StaleMap", str(error))
            except MapUnavailable as error:
                self._say("MapUnavailable", str(error))
            else:
                lost = lost_volume(ring, ShardName(self._inputs.config.name), volume.volume_id)
                if lost is None:
                    if not self._begins_anew(ring, stored):
                        await asyncio.to_thread(volume.store_map, ring)
                    return ring
                self._say("VolumeLost", lost)
                await self._announce(volume)
            await self._inputs.sleep(RETRY_S)

    async def _announce(self, volume: Volume) -> None:
        try:
            await self._inputs.announce(volume)
        except ControlPlaneUnavailable as error:
            self._inputs.events.event("control.away", level="warning", error=str(error))

    def _begins_anew(self, ring: RingMap, stored: StoredMap | None) -> bool:
        """Whether this volume takes the place of one that was given up, and no log was begun on it since.

        The map that says so is stored only after that: a log that vanishes later is a log that is lost.
        """
        shard = ShardName(self._inputs.config.name)
        restored = any(each.owner == shard and is_restored(each.via) for each in ring.ranges)
        if stored is None or stored.paper is None or not restored:
            return restored
        member, there = ring.member(shard), stored.paper.ring.member(shard)
        return there is None or there != member

    def _read_log(self, volume: Volume, slots: int, ring: RingMap | None) -> tuple[Memory, Rebuilt, LogStart]:
        """Blocks; runs in a thread."""
        inputs = self._inputs
        boot = LogBoot.open(inputs.disk, volume, inputs.config.log_config(), entropy=inputs.entropy)
        member = None if ring is None else ring.member(ShardName(inputs.config.name))
        if boot.empty and ring is not None and member and not self._begins_anew(ring, volume.stored_map()):
            # A shard makes its first segment before it announces itself: a member's log is never empty.
            raise LogLost(f"the ring map (epoch {ring.epoch}) binds this shard to this volume, but its log is gone")
        memory = Memory.empty(inputs.config, slots=slots, rows=boot)
        began_s = inputs.clock.monotonic_s()
        rebuilt = rebuild(boot, sessions=memory.sessions, keys=memory.keys, clock=inputs.clock)
        start = boot.cut()
        inputs.events.event(
            "log.read",
            records=rebuilt.records,
            seconds=round(inputs.clock.monotonic_s() - began_s, 3),
            damaged_ranges=len(boot.damage),
            strays=boot.strays,
        )
        return memory, rebuilt, start


class LogLost(Exception):
    """The volume is the right one, but what was on it is gone: never start afresh in silence."""
