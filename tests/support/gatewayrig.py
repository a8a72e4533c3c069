"""A boundary with fake shards behind it, and sinks that check what they get; for tests of the gateway's inner half."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec
from prometheus_client import CollectorRegistry

from fleetlm_common import rpc
from fleetlm_common.control import RingSpec, ShardEndpoint
from fleetlm_common.ids import Epoch, SessionId, Term
from fleetlm_common.logs import NullLogger
from fleetlm_gateway.boundary import Boundary, FromCursor, LiveOnly, Start, Subscription
from fleetlm_gateway.metrics import InnerMetrics
from fleetlm_gateway.shardlink import Connect, connect_tcp
from fleetlm_gateway.streams import Stream
from tests.support.fakeshard import RING_UID, FakeShard, World
from tests.support.memorycontrol import MemoryControlPlane

WAIT_S = 100.0
"""Of fast time: for what must happen."""


@dataclass
class Rig:
    """The parts of one test."""

    world: World
    control: MemoryControlPlane
    boundary: Boundary
    registry: CollectorRegistry

    @property
    def shards(self) -> list[FakeShard]:
        """By number."""
        return self.world.shards

    async def announce(self, shard: FakeShard) -> None:
        """Say where a shard is."""
        volume = f"volume-{shard.name}"
        await self.control.announce(
            ShardEndpoint(shard.name, volume, Term(shard.term), "127.0.0.1", shard.port, "", ready=True)
        )

    async def publish_maps(self) -> None:
        """Let the control plane catch up with the truth."""
        known = self.control.view.map
        for ring in self.world.maps[0 if known is None else known.epoch :]:
            await self.control.compare_and_swap(expected=None if ring.epoch == 1 else Epoch(ring.epoch - 1), new=ring)

    async def until_all_links(self) -> None:
        """Wait until every shard can be reached."""
        await until(lambda: self.boundary.ready().ok and not self.boundary.ready().message)

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value; 0 when it does not exist."""
        return self.registry.get_sample_value(f"fleetlm_gateway_{name}", labels) or 0.0


async def until(holds: Callable[[], object]) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: it never did.
    """
    async with asyncio.timeout(WAIT_S):
        while not holds():  # noqa: ASYNC110  conditions of many kinds; bounded by the time-out above
            await asyncio.sleep(0.01)


@asynccontextmanager
async def rig(
    *,
    shards: int = 1,
    slots: int = 8,
    seed: int = 1,
    connect: Connect = connect_tcp,
    control_kind: type[MemoryControlPlane] = MemoryControlPlane,
) -> AsyncGenerator[Rig, None]:
    """Fake shards, a control plane in memory and a started boundary with all its links up."""
    world = World(shards, slots=slots)
    control = control_kind(RingSpec(RING_UID, slots, shards))
    registry = CollectorRegistry()
    boundary = Boundary(
        gateway="gateway-0",
        credential=b"secret",
        control=control,
        entropy=random.Random(seed),
        log=NullLogger(),
        metrics=InnerMetrics(registry),
        connect=connect,
    )
    made = Rig(world, control, boundary, registry)
    for name in world.names:
        FakeShard(world, name)
    for shard in world.shards:
        await shard.start()
        await made.announce(shard)
    await made.publish_maps()
    await boundary.start()
    await made.until_all_links()
    try:
        yield made
    finally:
        await boundary.stop()
        for shard in world.shards:
            await shard.stop()


class Recorder:
    """A sink that writes down what it gets and refuses what is not contiguous.

    Args:
        cursor: where the stream must go on; None: wherever it begins.
    """

    def __init__(self, cursor: int | None = None) -> None:
        self.cursor = cursor
        self.full = False
        self.seqs: list[int] = []
        self.bodies: list[bytes] = []
        self.caught_ups: list[int] = []
        self.gaps: list[rpc.Gap] = []
        self.reads: list[tuple[str, int]] = []
        self.ended: list[str] = []
        self.order: list[str] = []

    def deliver(self, first_seq: int, count: int, body: bytes, /) -> bool:
        """See `Sink`."""
        assert not self.ended
        if self.full:
            return False
        seqs = [int(message["seq"]) for message in msgspec.json.decode(b"[%b]" % body, type=list[dict[str, object]])]  # type: ignore[call-overload]
        assert seqs == list(range(first_seq, first_seq + count)), (seqs, first_seq, count)
        assert self.cursor is None or first_seq == self.cursor + 1, f"{first_seq} came after {self.cursor}"
        self.cursor = seqs[-1]
        self.seqs += seqs
        self.bodies.append(body)
        self.order.append("messages")
        return True

    def gap(self, gap: rpc.Gap, /) -> None:
        """See `Sink`."""
        assert self.cursor is None or gap.from_seq == self.cursor + 1
        self.cursor = gap.next_seq - 1
        self.gaps.append(gap)
        self.order.append("gap")

    def caught_up(self, seq: int, /) -> None:
        """See `Sink`."""
        assert self.cursor in (None, seq)
        assert not self.caught_ups, "caught_up twice"
        self.cursor = seq
        self.caught_ups.append(seq)
        self.order.append("caught_up")

    def read(self, participant: str, last_read_seq: int, /) -> None:
        """See `Sink`."""
        self.reads.append((participant, last_read_seq))

    def closed(self, reason: str, /) -> None:
        """See `Sink`."""
        self.ended.append(reason)

    async def until(self, seq: int) -> None:
        """Wait for a message."""
        await until(lambda: self.cursor is not None and self.cursor >= seq)


S = SessionId("s")
"""The session of most tests."""


async def join(
    parts: Rig, start: Start, *, session: SessionId = S, begin: bool = True
) -> tuple[Recorder, Subscription]:
    """Subscribe and start delivery as the outer half does, with a sink that knows where the stream must go on."""
    sink = Recorder(start.seq if isinstance(start, FromCursor) else None)
    place = await parts.boundary.subscribe(session, start=start, sink=sink)
    if isinstance(start, LiveOnly):
        sink.cursor = place.info.last_seq
    if begin:
        place.begin()
    return sink, place


def stream_of(parts: Rig, session: SessionId = S) -> Stream:
    return parts.boundary._streams._streams[session]


async def until_subscribed(parts: Rig, session: SessionId = S) -> None:
    await until(lambda: stream_of(parts, session)._subscribed)
