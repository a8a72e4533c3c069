"""The simulated network: byte streams between processes, with the faults that TCP shows to its users.

Promise: within one direction of a connection bytes arrive once, in order, cut anywhere; a connection may be slow, held
up (a partition: bytes wait, nobody is told), cut (both ends learn of it, each in its own time) or half open (one end
learns, the other only when it writes or never). Memory between two ends is bounded: a writer learns that its peer does
not read. Must not be done here: deciding when (`nemesis.py`).
"""

from __future__ import annotations

import asyncio
import contextvars
import random
import zlib
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from tests.sim.loop import SimLoop, SimProcess, current
from tests.sim.trace import Trace

KERNEL_BYTES: Final = 16 * 1024
"""What the two kernels hold of one direction; beyond it the writer's own buffer grows."""
HIGH_WATER: Final = 64 * 1024
REFUSED_S: Final = 0.001
UNREACHABLE_S: Final = 64.0
"""The longest wait of a kernel that asks again for a connection."""
_WORLD: Final = contextvars.Context()
"""Callbacks of the world itself: no process owns them."""


def machine_of(process: SimProcess) -> str:
    """Where it runs: each component has a machine of its own, which outlives its processes."""
    return process.name.partition("/")[0]


class Network:
    """All connections of a run.

    Args:
        loop: time.
        rng: delays and cuts.
        trace: for what arrives.

    Attributes:
        strike_in: pieces of bytes until `strike` is called with the end that sent the last of them, which is under way.
    """

    def __init__(self, loop: SimLoop, rng: random.Random, trace: Trace) -> None:
        self.loop = loop
        self.rng = rng
        self.trace = trace
        self.latency_s = 0.0005
        self.fragments = 0.1
        self.connections: list[Connection] = []
        self.blocked: dict[tuple[str, str], bool] = {}
        self.strike_in: int | None = None
        self.strike: Callable[[End], None] = lambda _: None
        self._listeners: dict[int, tuple[SimProcess, Callable[[], asyncio.Protocol]]] = {}
        self._next_port = 20_000
        loop.open_connection = self.connect
        loop.open_listener = self.listen

    def is_blocked(self, left: str, right: str) -> bool:
        """Whether bytes between two machines are held up now."""
        return (min(left, right), max(left, right)) in self.blocked

    def block(self, left: str, right: str) -> None:
        """A partition between two machines."""
        self.blocked[min(left, right), max(left, right)] = True

    def heal(self) -> None:
        """End all partitions."""
        self.blocked.clear()
        for connection in list(self.connections):
            connection.kick()

    def heal_pair(self, left: str, right: str) -> None:
        """End one partition."""
        self.blocked.pop((min(left, right), max(left, right)), None)
        for connection in list(self.connections):
            connection.kick()

    def between(self, left: str, right: str = "") -> list[Connection]:
        """Open connections of a machine (to another one)."""
        return [each for each in self.connections if left in each.machines and (not right or right in each.machines)]

    def delay_s(self) -> float:
        """Of one piece; mostly short, sometimes not."""
        rng = self.rng
        return self.latency_s * (0.2 + rng.random() * 1.6) * (20 if rng.random() < 0.01 else 1)

    # --- for the loop

    def listen(self, factory: Callable[[], asyncio.Protocol], host: Any, port: Any) -> Listener:
        """See `loop.create_server`."""
        process = current()
        assert process is not None
        if not port:
            self._next_port += 1
            port = self._next_port
        if int(port) in self._listeners:
            raise OSError(98, "address in use")
        self._listeners[int(port)] = (process, factory)
        listener = Listener(self, int(port))
        process.on_kill.append(listener.close)
        return listener

    def listens(self, port: int) -> bool:
        """Whether somebody listens there."""
        return port in self._listeners

    def unlisten(self, port: int) -> None:
        """Nobody listens there any more."""
        self._listeners.pop(port, None)

    async def connect(self, factory: Callable[[], asyncio.Protocol], host: Any, port: Any) -> tuple[Any, Any]:
        """See `loop.create_connection`."""
        process = current()
        assert process is not None
        await asyncio.sleep(self.delay_s())
        there, wait_s = self._listeners.get(int(port)), 1.0
        # The kernel asks again after 1, 2, 4 … seconds.
        while there is not None and self.is_blocked(machine_of(process), machine_of(there[0])):
            if wait_s > UNREACHABLE_S:
                raise TimeoutError("nobody answers")
            await asyncio.sleep(wait_s)
            there, wait_s = self._listeners.get(int(port)), wait_s * 2
        if there is None:
            await asyncio.sleep(REFUSED_S)
            raise ConnectionRefusedError(111, f"port {port}: connection refused")
        server, server_factory = there
        connection = Connection(self, process, server)
        protocol = factory()
        connection.ends[0].protocol = protocol
        self.connections.append(connection)
        self.trace.add("net", "connect", connection.name)
        # The kernel accepts, whatever the process does: a frozen one learns of it when it goes on.
        server.call_soon(connection.accepted, server_factory)
        try:
            await asyncio.sleep(self.delay_s())
        except asyncio.CancelledError:
            # Nobody holds the socket: it is closed, as asyncio does.
            connection.ends[0].abort()
            raise
        connection.ends[0].begin()
        protocol.connection_made(connection.ends[0])
        return connection.ends[0], protocol


class Listener:
    """`asyncio.Server`, as far as it is used."""

    def __init__(self, network: Network, port: int) -> None:
        self._network = network
        self._port = port
        self.sockets = [self]

    def getsockname(self) -> tuple[str, int]:
        """Host and port."""
        return "127.0.0.1", self._port

    def close(self) -> None:
        """Stop listening."""
        self._network.unlisten(self._port)

    async def wait_closed(self) -> None:
        """Nothing to wait for."""

    def is_serving(self) -> bool:
        """See asyncio."""
        return True


class Connection:
    """Two ends, each the transport of one process."""

    def __init__(self, network: Network, left: SimProcess, right: SimProcess) -> None:
        self.network = network
        self.machines = (machine_of(left), machine_of(right))
        self.name = f"{left.name}>{right.name}"
        self.silent = False
        self.ends = (End(self, left, 0), End(self, right, 1))
        for end, peer in zip(self.ends, reversed(self.ends), strict=True):
            end.peer = peer
            end.process.on_kill.append(end.process_died)

    def accepted(self, factory: Callable[[], asyncio.Protocol]) -> None:
        """In the listening process: the connection is there."""
        end = self.ends[1]
        if end.lost:
            return
        protocol = factory()
        end.protocol = protocol
        end.begin()
        protocol.connection_made(end)

    @property
    def held(self) -> bool:
        """Nothing arrives now."""
        return self.silent or (bool(self.network.blocked) and self.network.is_blocked(*self.machines))

    def kick(self) -> None:
        """A partition ended: what waits goes on, and who writes to an end that is gone is told."""
        if self.held:
            return
        for end in self.ends:
            end.carry()
            if end.lost:
                end.peer.reset_later(ConnectionResetError(104, "reset by peer"))

    def cut(self) -> None:
        """Reset: both ends learn of it, each in its own time; what was on its way may be lost, both ways or one."""
        self.network.trace.add("net", "cut", self.name)
        for end in self.ends:
            end.mute = end.mute or self.network.rng.random() < 0.7
        for end in self.ends:
            end.reset_later(ConnectionResetError(104, "cut"))

    def unplug(self) -> None:
        """One machine has no power: what it sent may not have left it, and the other end hears nothing any more."""
        if self.network.rng.random() < 0.5:
            self.silent = True
            for end in self.ends:
                end.mute = True

    def half_open(self) -> None:
        """The right end is gone; the left one hears nothing any more, and what it writes goes nowhere."""
        self.network.trace.add("net", "half_open", self.name)
        self.silent = True
        self.ends[1].reset_later(ConnectionResetError(104, "half open"))

    def forget(self) -> None:
        """Both ends are gone."""
        if all(end.lost for end in self.ends) and self in self.network.connections:
            self.network.connections.remove(self)
            for end in self.ends:
                if not end.process.dead:
                    end.process.on_kill.remove(end.process_died)


class End(asyncio.Transport):
    """One end: the transport that its process writes to."""

    def __init__(self, connection: Connection, process: SimProcess, side: int) -> None:
        super().__init__()
        self.process = process
        self.protocol: asyncio.BaseProtocol | None = None
        self.lost = False
        self.mute = False
        self.peer: End
        self._connection = connection
        self._network = connection.network
        self._name = f"{connection.name}{side}"
        self._closing = False
        self._begun = False
        self._paused = False
        self._full = False
        self._high, self._low = HIGH_WATER, HIGH_WATER // 4
        self._outgoing = bytearray()
        self._flying = 0
        self._arrive_at_s = 0.0
        self._received: deque[bytes] = deque()
        self.unread = 0
        self._eof = False

    @property
    def connection(self) -> Connection:
        """Whose end it is."""
        return self._connection

    def begin(self) -> None:
        """The protocol is there: what has arrived may be handed to it."""
        self._begun = True
        self.process.call_soon(self._hand_over)

    # --- asyncio's transport

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """See asyncio."""
        return {"peername": (self.peer.process.name, 0)}.get(name, default)

    def is_closing(self) -> bool:
        """See asyncio."""
        return self._closing or self.lost

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """See asyncio."""
        self.protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        """See asyncio."""
        assert self.protocol is not None
        return self.protocol

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """See asyncio."""
        self._high = HIGH_WATER if high is None else high
        self._low = self._high // 4 if low is None else low

    def get_write_buffer_size(self) -> int:
        """Bytes that the kernels have not taken."""
        return max(0, len(self._outgoing) + self._flying + self.peer.unread - KERNEL_BYTES)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """See asyncio."""
        if self._closing or self.lost or self.process.dead:
            return
        self._outgoing += data
        self.carry()
        if not self._full and self.get_write_buffer_size() > self._high:
            self._full = True
            assert isinstance(self.protocol, asyncio.BaseProtocol)
            self.protocol.pause_writing()

    def writelines(self, list_of_data: Any) -> None:
        """See asyncio."""
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        """Send what is buffered, then end."""
        if self._closing or self.lost:
            return
        self._closing = True
        self.carry()
        self._end_if_done()

    def abort(self) -> None:
        """End now; the peer is told by a reset."""
        if self.lost:
            return
        self._closing = True
        self._outgoing.clear()
        self._lose_soon(None)
        if not self._connection.held:
            self.peer.reset_later(ConnectionResetError(104, "reset by peer"))

    def pause_reading(self) -> None:
        """See asyncio."""
        self._paused = True

    def resume_reading(self) -> None:
        """See asyncio."""
        if self._paused:
            self._paused = False
            self.process.call_soon(self._hand_over)

    def is_reading(self) -> bool:
        """See asyncio."""
        return not self._paused

    # --- the way of bytes

    def carry(self) -> None:
        """Send what may be sent: pieces of any length, one after the other."""
        outgoing = self._outgoing
        if not outgoing or self._connection.held:
            return
        network, peer = self._network, self.peer
        while outgoing and not peer.lost:
            room = KERNEL_BYTES - self._flying - peer.unread
            if room <= 0:
                return
            size = min(len(outgoing), room)
            if size > 1 and network.fragments and network.rng.random() < network.fragments:
                size = network.rng.randrange(1, size)
            piece = bytes(outgoing[:size])
            del outgoing[:size]
            self._flying += size
            self._arrive_at_s = max(self._arrive_at_s, network.loop.time() + network.delay_s())
            network.loop.call_at(self._arrive_at_s, self._arrived, piece, context=_WORLD)

    def _arrived(self, piece: bytes) -> None:
        """At the peer's kernel."""
        peer, network = self.peer, self._network
        if network.strike_in is not None:
            network.strike_in -= 1
            if network.strike_in <= 0:
                network.strike_in = None
                network.strike(self)
        self._flying -= len(piece)
        if peer.lost or self.mute or self._connection.silent:
            return
        network.trace.add("net", "bytes", f"{self._name} {len(piece)} {zlib.crc32(piece)}")
        peer._received.append(piece)
        peer.unread += len(piece)
        if not peer.process.dead:
            peer.process.call_soon(peer._hand_over)
        if self._outgoing:
            self.carry()
        if self._closing:
            self._end_if_done()

    def _hand_over(self) -> None:
        """In the receiving process."""
        while self._received and not self._paused and self._begun and not self.lost:
            piece = self._received.popleft()
            self.unread -= len(piece)
            assert isinstance(self.protocol, asyncio.Protocol)
            self.protocol.data_received(piece)
            if self.peer.wants_room:
                self._network.loop.call_soon(self.peer.room, context=_WORLD)
        if self._eof and not self._received and self._begun and not self.lost and not self._closing:
            self._eof = False
            assert isinstance(self.protocol, asyncio.Protocol)
            if not self.protocol.eof_received():
                self.close()

    @property
    def wants_room(self) -> bool:
        """Whether it matters to this end that the peer takes something."""
        return bool(self._outgoing) or self._full or self._closing

    def room(self) -> None:
        """The peer has taken something."""
        self.carry()
        if self._full and self.get_write_buffer_size() <= self._low and not self.lost:
            self._full = False
            self.process.call_soon(self._resume)
        self._end_if_done()

    def _resume(self) -> None:
        if not self.lost and self.protocol is not None:
            assert isinstance(self.protocol, asyncio.BaseProtocol)
            self.protocol.resume_writing()

    # --- ends

    def _end_if_done(self) -> None:
        """A closing end is done when its bytes have arrived: then the peer sees the end of the stream."""
        if not self._closing or self.lost or self._outgoing or self._flying:
            return
        peer = self.peer
        if not peer.lost and not self._connection.held:
            peer._eof = True
            peer.process.call_soon(peer._hand_over)
        self._lose_soon(None)

    def reset_later(self, error: Exception) -> None:
        """The peer's reset arrives, not before what arrived already."""
        if self.lost:
            return
        network = self._network
        at_s = max(self.peer._arrive_at_s, network.loop.time() + network.delay_s())
        network.loop.call_at(at_s, self._lose_soon, error, context=_WORLD)

    def _lose_soon(self, error: Exception | None) -> None:
        if self.lost:
            return
        self.lost = True
        self._received.clear()
        self.unread = 0
        self._outgoing.clear()
        self.process.call_soon(self._say_lost, error)
        self._connection.forget()

    def _say_lost(self, error: Exception | None) -> None:
        if self._begun and self.protocol is not None:
            self.protocol.connection_lost(error)

    def process_died(self) -> None:
        """Its kernel closes: the peer gets what was sent before, then a reset; after a power loss it hears nothing."""
        if self.lost:
            return
        self.lost = True
        if not self._connection.held:
            self.peer.reset_later(ConnectionResetError(104, "the peer's process died"))
        self._connection.forget()
