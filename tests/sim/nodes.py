"""Machines of the simulated world and what runs on them: shards, gateways, controllers, each the product's own code.

Place: what `cli/supervisor.py` or the kubelet does: start a process, start it again when it ended. Promise: the code
between a component's sockets and files is the real one; what stands here instead of it is named in docs/simulator.md.
Must not be done here: faults (`nemesis.py`), load (`workload.py`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from prometheus_client import CollectorRegistry

from fleetlm_common.errors import FleetError
from fleetlm_gateway.boundary import Boundary
from fleetlm_gateway.config import GatewayConfig
from fleetlm_gateway.drafts import Keys
from fleetlm_gateway.hub import Hub
from fleetlm_gateway.metrics import InnerMetrics, OuterMetrics
from fleetlm_gateway.principal import principal
from fleetlm_gateway.websocket import Socket
from fleetlm_operator.controller import Controller
from fleetlm_operator.metrics import Metrics
from fleetlm_shard.config import ShardConfig
from fleetlm_shard.log_types import LogConfig
from fleetlm_shard.process import Outside, ShardProcess
from tests.sim.control import SimControl
from tests.sim.disk import Drive, sim_lanes
from tests.sim.loop import SimProcess
from tests.sim.network import Network
from tests.sim.trace import TraceLogger
from tests.support.simdisk import SimVolume

if TYPE_CHECKING:
    from tests.sim.world import World

SECRET = b"simulated"
YOUNGER_MAX = 2
"""Processes of one shard at once beside its newest."""
SEGMENT_BYTES = 96 * 1024
"""Small: a log rotates several times in a run."""


class SimShardConfig(ShardConfig, frozen=True, kw_only=True):
    """A shard's settings with small files.

    Attributes:
        file_bytes: of a segment.
        round_bytes: of a batch.
    """

    file_bytes: int = SEGMENT_BYTES
    round_bytes: int = 40 * 1024

    def log_config(self) -> LogConfig:
        """See `ShardConfig`."""
        return LogConfig(
            segment_bytes=self.file_bytes,
            boot_segment_bytes=self.file_bytes,
            batch_bytes_max=self.round_bytes,
            queue_bytes_max=self.queue_bytes_max,
            reserve_bytes=self.disk_reserve_bytes,
        )


class SimClock:
    """`Clock` of one machine: a monotonic clock that is the loop's, a wall clock that people set."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.step_s = 0.0

    def monotonic_s(self) -> float:
        """See `Clock`."""
        return self._loop.time()

    def now_us(self) -> int:
        """See `Clock`."""
        return int((1_795_000_000 + self._loop.time() + self.step_s) * 1e6)

    def now_ms(self) -> int:
        """See `Clock`."""
        return self.now_us() // 1000


class Node:
    """A machine on which one process after the other lives.

    Args:
        world: the run.
        name: of the machine.
    """

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.lives = 0
        self.process: SimProcess | None = None
        self.clock = SimClock(world.loop)
        self.restart_after_s: Callable[[], float] = lambda: world.rng.uniform(0.05, 1.5)
        self.stopped = False

    @property
    def alive(self) -> bool:
        """Whether a process is there (running or frozen)."""
        return self.process is not None and not self.process.dead

    def start(self) -> SimProcess:
        """A new life."""
        self.lives += 1
        process = SimProcess(self.world.loop, f"{self.name}/{self.lives}")
        self.process = process
        self.world.processes.append(process)
        self.world.trace.add(process.name, "started")
        process.on_kill.append(lambda: self._ended(process))
        self.boot(process)
        return process

    def boot(self, process: SimProcess) -> None:
        """Start the component in it."""
        raise NotImplementedError

    def run(self, process: SimProcess, work: Coroutine[Any, Any, object]) -> None:
        """Its main coroutine: when it is over, the process has ended."""

        async def main() -> None:
            try:
                status = await work
            except Exception as error:  # noqa: BLE001  a process that ends by an exception says so on its last line
                process.loop.faults.append(f"{process.name} ended by {error!r}")
                process.loop.trace.add(process.name, "ended_by", repr(error))
                status = 1
            process.exit_status = status if isinstance(status, int) else 0
            process.loop.trace.add(process.name, "exit", str(process.exit_status))
            process.kill()

        process.spawn(main(), name=f"{process.name} main")

    def kill(self) -> None:
        """SIGKILL the newest life."""
        if self.process is not None:
            self.process.kill()

    def signal(self, number: int) -> None:
        """SIGTERM and the like."""
        if self.process is not None and not self.process.dead and number in self.process.signals:
            self.world.trace.add(self.process.name, "signal", str(number))
            self.process.signals[number]()

    def _ended(self, process: SimProcess) -> None:
        if process is self.process and not self.stopped:
            self.world.loop.call_later(self.restart_after_s(), self._restart, process, context=self.world.context)

    def _restart(self, before: SimProcess) -> None:
        if self.process is before and not self.stopped:
            self.start()

    def entropy(self) -> random.Random:
        """For a new life."""
        return random.Random(self.world.rng.getrandbits(64))


class ShardNode(Node):
    """A shard with its volume."""

    def __init__(self, world: World, name: str, *, capacity_bytes: int = 1 << 40) -> None:
        super().__init__(world, name)
        self.drive = self._new_drive(capacity_bytes)
        self.when_frozen: Callable[[SimProcess], None] | None = None
        self.takeover_s = world.rng.choice((1.5, 1.5, 4.0, 10.0))
        self.shards: dict[str, ShardProcess] = {}
        self.settings: dict[str, Any] = {"hot_bytes_max": 64 * 1024} if world.tight else {}
        self.settings |= world.shard_settings

    def _new_drive(self, capacity_bytes: int) -> Drive:
        rng = self.world.rng
        volume = SimVolume(capacity_bytes=capacity_bytes, split_writes=rng.random() < 0.5)
        drive = Drive(volume, random.Random(rng.getrandbits(64)))
        drive.frozen = self._frozen_in_batch
        drive.lose_power = self.power_loss
        # Every other: a source that waits for its segment, and a target that does not.
        if self.world.moment == "scarce" and self.name[-1] in "02":
            drive.prepare_s = self.world.moment_rng.uniform(1.5, 2.5)
        drive.usual_latency_s = drive.latency_s = rng.choice((0.0003, 0.0008, 0.0008, 0.004, 0.02))
        return drive

    @property
    def over(self) -> bool:
        """Nobody lives on the volume, not even one whom a younger one has followed."""
        return all(process.dead for process in self.drive.processes.values())

    def give_volume_away(self) -> None:
        """The next process gets an empty one."""
        assert self.over, "nobody of before may live"
        self.drive = self._new_drive(self.drive.volume.capacity_bytes)

    def kill_all(self) -> None:
        """Every process on the volume, also those that a younger one has followed."""
        for process in list(self.drive.processes.values()):
            process.kill()

    def boot(self, process: SimProcess) -> None:
        """`python -m fleetlm_shard`."""
        world, disk = self.world, self.drive.volume.process(process.name)
        self.drive.processes[process.name] = process
        process.on_kill.append(lambda: self.drive.volume.kill(process.name))
        entropy = self.entropy()
        config = SimShardConfig(
            name=self.name,
            data="/simulated",
            listen="127.0.0.1:0",
            ops_listen="127.0.0.1:0",
            control="file:/simulated",
            credential_file="none",
            disk_reserve_bytes=SEGMENT_BYTES,
            checkpoint_bytes=48 * 1024,
            pod_uid=f"pod-{self.name}",
            takeover_after_s=self.takeover_s,
            drain_s=1.0,
        )
        config = msgspec.structs.replace(config, **self.settings)
        outside = Outside(
            disk=disk,
            control=SimControl(world.control, self.name, world.weather),
            clock=self.clock,
            entropy=entropy,
            events=TraceLogger(world.trace, process.name),
            secret=SECRET,
            new_volume_id=f"volume-{entropy.getrandbits(64):016x}",
            boot_id=f"boot-{entropy.getrandbits(64):016x}",
            archive_dsn="",
            lanes=lambda _: sim_lanes(process, self.drive),
            exit_now=process.exit,
        )

        async def main() -> int:
            made = self.shards[process.name] = ShardProcess(config, outside)
            return await made.run()

        self.run(process, main())

    def power_loss(self) -> None:
        """Every process of the machine dies, and what was in its cache."""
        loss = self.drive.random_loss()
        self.world.trace.add(self.name, "power_loss", f"{len(loss.keep)} units kept, {loss.torn}")
        for connection in self.world.network.between(self.name):
            connection.unplug()
        for process in list(self.drive.processes.values()):
            process.kill()
        self.drive.volume.power_loss(loss)

    @property
    def ready(self) -> bool:
        """Whether its newest process serves all that it should."""
        made = self.shards.get(self.process.name) if self.process is not None and self.alive else None
        return made is not None and made.health().ok

    @property
    def crowded(self) -> bool:
        """More processes on the volume would only wait for each other."""
        return sum(not process.dead for process in self.drive.processes.values()) > YOUNGER_MAX

    def overtake(self, thaw_after_s: Callable[[], float]) -> None:
        """Another container boots while the first one stands still, which goes on after so long."""
        elder = self.process
        if elder is None or elder.state != "running" or self.crowded:
            return
        elder.freeze()
        self.world.later(thaw_after_s(), elder.thaw)
        self.start_younger()

    def start_younger(self) -> None:
        """A second container on the same volume, while the first is frozen (or not)."""
        if not self.stopped:
            self.start()

    def _frozen_in_batch(self, process: SimProcess) -> None:
        """The writer stands still: a younger one may come, and the elder wakes up later."""
        if self.when_frozen is not None:
            act, self.when_frozen = self.when_frozen, None
            act(process)
            return
        rng = self.world.rng
        if rng.random() < 0.7:
            self.world.later(rng.uniform(0.1, 2.0), lambda: None if process.dead else self.start_younger())
        self.world.later(rng.uniform(0.5, 16.0), process.thaw)


@dataclass(frozen=True)
class _Parts:
    """What a gateway process consists of."""

    boundary: Boundary
    hub: Hub
    registry: CollectorRegistry


class Door(asyncio.Protocol):
    """In the place of the HTTP upgrade: a line with the participant's name, answered by a line; then a `Socket`."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._data = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        transport = self._transport
        assert transport is not None
        self._data += data
        line, found, rest = self._data.partition(b"\n")
        if not found:
            return
        try:
            self._hub.admit()
        except FleetError:
            transport.write(b"503\n")
            transport.close()
            return
        transport.write(b"101\n")
        socket = Socket(self._hub, principal(line.decode(), "human"))
        transport.set_protocol(socket)
        socket.connection_made(transport)
        if rest:
            socket.data_received(rest)


class GatewayNode(Node):
    """A gateway."""

    def __init__(self, world: World, name: str, port: int) -> None:
        super().__init__(world, name)
        self.port = port
        self.parts: _Parts | None = None
        self.settings: dict[str, Any] = {"write_buffer_bytes": 8192, "requests_per_socket": 4} if world.tight else {}

    @property
    def lanes(self) -> float:
        """Sessions with an append on its way, also of clients that are dead."""
        assert self.parts is not None, "it serves"
        count = self.parts.registry.get_sample_value("fleetlm_gateway_append_lanes")
        assert count is not None, "the metric has this name"
        return count

    def boot(self, process: SimProcess) -> None:
        """`python -m fleetlm_gateway`, without aiohttp: REST and the upgrade are left out."""
        self.run(process, self._main(process))

    async def _main(self, process: SimProcess) -> int:
        world, entropy, registry = self.world, self.entropy(), CollectorRegistry()
        log = TraceLogger(world.trace, process.name)
        boundary = Boundary(
            gateway=self.name,
            credential=SECRET,
            control=SimControl(world.control, self.name, world.weather),
            entropy=entropy,
            log=log,
            metrics=InnerMetrics(registry),
        )
        config = GatewayConfig(control="file:/simulated", credential_file="none", name=self.name, drain_window_ms=1500)
        hub = Hub(
            config=msgspec.structs.replace(config, **self.settings),
            boundary=boundary,
            metrics=OuterMetrics(registry),
            log=log,
            clock=self.clock,
            entropy=entropy,
            keys=Keys(f"{entropy.getrandbits(80):020x}"),
        )
        self.parts = _Parts(boundary, hub, registry)
        leave = asyncio.Event()
        process.loop.add_signal_handler(15, leave.set)
        await boundary.start()
        listener = await process.loop.create_server(lambda: Door(hub), "127.0.0.1", self.port)
        await leave.wait()
        listener.close()
        await hub.drain()
        await boundary.stop()
        return 0


class ControllerNode(Node):
    """One of several controllers."""

    def boot(self, process: SimProcess) -> None:
        """`python -m fleetlm_operator`."""
        world = self.world
        control = SimControl(world.control, self.name, world.weather)
        log = TraceLogger(world.trace, process.name)

        async def main() -> None:
            await Controller(control, log=log, metrics=Metrics(CollectorRegistry()), clock=self.clock).run()

        self.run(process, main())


__all__ = ["ControllerNode", "GatewayNode", "Network", "Node", "ShardNode"]
