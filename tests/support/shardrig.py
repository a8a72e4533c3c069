"""A whole shard in the test's own loop: real log on a simulated volume, real sockets, a disk that can be made to wait.

    async with shard_rig() as rig, await rig.client() as client:
        rig.writer.hold()                       # batches reach the disk no more …
        ...
        rig.writer.release()                    # … until now

Promise: everything between socket and disk is the product's own. Must not be done here: faults of files (`faults.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from fleetlm_common import rpc
from fleetlm_common.control import RingSpec, ShardEndpoint
from fleetlm_common.ids import Epoch, ShardName, Term
from fleetlm_common.logs import NullLogger
from fleetlm_common.ring import Member, RingMap, ranges_from
from fleetlm_shard.boot import Boot, Booted, BootInputs
from fleetlm_shard.config import ShardConfig
from fleetlm_shard.lanes import InlineLane, Lanes
from fleetlm_shard.server import Credentials
from fleetlm_shard.shard import Shard, World
from fleetlm_shard.volume import Volume
from tests.support.memorycontrol import MemoryControlPlane
from tests.support.rpcclient import RpcClient
from tests.support.simdisk import SimVolume

T = TypeVar("T")
SLOTS = 8
NAME = ShardName("shard-0")
SECRET = b"rig"
CONFIG = ShardConfig(
    name=NAME,
    data="simulated",
    listen="127.0.0.1:0",
    ops_listen="127.0.0.1:0",
    control="file:/simulated",
    credential_file="none",
    segment_bytes=4 * 1024 * 1024,
    disk_reserve_bytes=0,
)


class RigClock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.at_us = 1_795_475_336_123_456
        self.at_s = 1000.0

    def advance(self, seconds: float) -> None:
        """Both clocks move."""
        self.at_us += int(seconds * 1e6)
        self.at_s += seconds

    def now_ms(self) -> int:
        """See `Clock`."""
        return self.at_us // 1000

    def now_us(self) -> int:
        """See `Clock`."""
        return self.at_us

    def monotonic_s(self) -> float:
        """See `Clock`."""
        return self.at_s


class HeldLane:
    """`Lane` in the loop that keeps work back while it is told to."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._inner = InlineLane(loop)
        self._held: list[Callable[[], None]] = []
        self.holding = False

    def hold(self) -> None:
        """Keep back what is submitted from now on."""
        self.holding = True

    def release(self) -> None:
        """Do all of it, and go on."""
        self.holding = False
        held, self._held = self._held, []
        for each in held:
            each()

    @property
    def waiting(self) -> int:
        """Pieces of work that are kept back."""
        return len(self._held)

    def submit(self, work: Callable[[], T], done: Callable[[T | None, BaseException | None], None]) -> None:
        """See `Lane`."""
        if self.holding:
            self._held.append(lambda: self._inner.submit(work, done))
        else:
            self._inner.submit(work, done)

    def close(self) -> None:
        """See `Lane`."""


@dataclass
class Rig:
    """A running shard."""

    shard: Shard
    booted: Booted
    clock: RigClock
    control: MemoryControlPlane
    writer: HeldLane
    preparer: HeldLane
    port: int = 0
    stored: list[RingMap] = field(default_factory=list[RingMap])
    stopped: list[BaseException] = field(default_factory=list[BaseException])
    batches: list[Callable[[int, float], None]] = field(default_factory=list[Callable[[int, float], None]])
    """Told of each batch."""
    syncs: list[Callable[[float], None]] = field(default_factory=list[Callable[[float], None]])
    """Told of each sync."""

    def hello(self) -> rpc.Hello:
        """A good HELLO."""
        volume = self.booted.volume
        epoch = self.shard.ownership.epoch
        return rpc.Hello(rpc.PROTOCOL, volume.ring_uid, volume.shard, volume.volume_id, "rig", SECRET, epoch)

    def endpoint(self) -> ShardEndpoint:
        """What it announces (but for its readiness and its moves)."""
        volume = self.booted.volume
        return ShardEndpoint(
            ShardName(volume.shard), volume.volume_id, Term(volume.term), "127.0.0.1", self.port, "", ready=True
        )

    async def client(self) -> RpcClient:
        """A connection that has said HELLO."""
        return await RpcClient.connect("127.0.0.1", self.port, self.hello())

    async def own(self, owners: list[ShardName]) -> RingMap:
        """Publish the next map and act on it."""
        current = self.control.view.map
        expected = None if current is None else current.epoch
        epoch = Epoch((expected or 0) + 1)
        members = tuple(Member(name, self.booted.volume.volume_id) for name in sorted({*owners, NAME}))
        ring = RingMap("ring-1", SLOTS, epoch, members, ranges_from([(owner, epoch) for owner in owners]))
        await self.control.compare_and_swap(expected=expected, new=ring)
        return ring


@asynccontextmanager
async def shard_rig(
    volume: SimVolume | None = None,
    *,
    config: ShardConfig = CONFIG,
    clock: RigClock | None = None,
    control: MemoryControlPlane | None = None,
    process: str = "shard",
    name: ShardName = NAME,
    **changes: object,
) -> AsyncGenerator[Rig]:
    """A shard that owns all slots; ends without any last word, like a killed one (its volume can be booted again)."""
    config = msgspec.structs.replace(config, name=name, **changes)
    volume = SimVolume() if volume is None else volume
    clock = clock or RigClock()
    control = control or MemoryControlPlane(RingSpec(uid="ring-1", slots=SLOTS, shards=1))
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[None]] = []

    def keep(work: Coroutine[None, None, None]) -> None:
        tasks.append(loop.create_task(work))

    async def unheard(_: Volume) -> None:
        """Nobody gives a volume up here."""

    inputs = BootInputs(
        config=config,
        disk=volume.process(process),
        control=control,
        clock=clock,
        entropy=random.Random(7),
        sleep=asyncio.sleep,
        events=NullLogger(),
        new_volume_id="volume-1" if name == NAME else f"volume-of-{name}",
        boot_id=f"boot-{process}",
        keep=keep,
        announce=unheard,
    )
    rig = _make(await Boot(inputs).run(), inputs, control, clock)
    shard, writer = rig.shard, rig.writer
    shard.log.start()
    listener = await loop.create_server(shard.server.protocol, "127.0.0.1", 0)
    rig.port = listener.sockets[0].getsockname()[1]
    if control.view.map is None:
        await rig.own([NAME] * SLOTS)
    assert control.view.map is not None
    await control.announce(rig.endpoint())
    await shard.ownership.adopt(control.view.map)
    keep(shard.ownership.watch())
    try:
        yield rig
    finally:
        writer.release()
        # CPython 3.11 forgets a connection that it accepted in the turn of `close`: its socket is left to the collector
        # which warns in whatever test comes next. So take no more, and let those taken become connections first.
        for each in listener.sockets:
            loop.remove_reader(each.fileno())
        await asyncio.sleep(0)
        listener.close()
        shard.server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        shard.moves.cancel()
        with contextlib.suppress(Exception):
            await shard.log.close()
        volume.kill(process)


def _make(booted: Booted, inputs: BootInputs, control: MemoryControlPlane, clock: RigClock) -> Rig:
    """The shard, not serving yet."""
    loop = asyncio.get_running_loop()
    writer, preparer, inline = HeldLane(loop), HeldLane(loop), InlineLane(loop)
    stored: list[RingMap] = []
    stopped: list[BaseException] = []
    batches: list[Callable[[int, float], None]] = []
    syncs: list[Callable[[float], None]] = []

    def measured(records: int, seconds: float) -> None:
        for told in batches:
            told(records, seconds)

    def observe_sync(seconds: float) -> None:
        for told in syncs:
            told(seconds)

    async def store_map(ring: RingMap) -> None:
        booted.volume.store_map(ring)
        stored.append(ring)

    shard = Shard(
        config=inputs.config,
        credentials=Credentials(
            booted.volume.ring_uid, inputs.config.name, booted.volume.volume_id, booted.volume.term, SECRET
        ),
        slots=SLOTS,
        start=booted.start,
        memory=booted.memory,
        rebuilt=booted.rebuilt,
        world=World(
            clock=clock,
            entropy=random.Random(8),
            control=control,
            lanes=Lanes(writer=writer, preparer=preparer, background=inline, readers=[inline], pause=lambda: None),
            sleep=asyncio.sleep,
            events=NullLogger(),
            store_map=store_map,
            observe_sync=observe_sync,
            measured=measured,
            on_stopped=stopped.append,
        ),
    )
    return Rig(
        shard, booted, clock, control, writer, preparer, stored=stored, stopped=stopped, batches=batches, syncs=syncs
    )
