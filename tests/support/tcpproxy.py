"""A TCP proxy that makes the network bad: between client and gateway, or between gateway and shard.

    proxy = TcpProxy("127.0.0.1", 4000); port = await proxy.start()
    proxy.cut()              # every connection is reset
    proxy.hole()             # half-open: connected, and silent, without even an end; `heal()` lets all through
    proxy.delay_s = 0.2      # each chunk comes later
    proxy.piece_bytes = 1    # … in pieces of one byte, a packet each
    proxy.turn_round = 3     # new connections reach the target three at a time, the last one first
    proxy.refuse = True      # new connections are reset

Promise: bytes of a connection are never lost, changed or reordered unless `through` does it: what TCP promises holds on
both sides, so what goes wrong behind it is the product's fault. Must not be done here: knowing any protocol.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

READ_BYTES: Final = 64 * 1024
_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER of no time: closing resets."""

Through = Callable[[bytes], bytes]
"""What becomes of a chunk that the target sends."""


class TcpProxy:
    """One listener before one target.

    Args:
        host: of the target.
        port: of the target.
        through: changes what the target sends (for rogue peers); one per connection is made.
    """

    def __init__(self, host: str, port: int, *, through: Callable[[], Through] | None = None) -> None:
        self.delay_s = 0.0
        self.piece_bytes = READ_BYTES
        self.refuse = False
        self.turn_round = 1
        self.connections = 0
        self._target = host, port
        self._through = through
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns: list[asyncio.Future[None]] = []
        self._listener: asyncio.Server | None = None

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> int:
        """Listen; returns the port."""
        self._listener = await asyncio.start_server(self._accepted, host, port, backlog=1024)
        address: tuple[str, int] = self._listener.sockets[0].getsockname()
        return address[1]

    def cut(self) -> int:
        """Reset every connection on both sides; returns how many sides."""
        count = len(self._writers)
        for writer in list(self._writers):
            reset(writer)
        return count

    def hole(self) -> None:
        """Let nothing through from now on, in both directions, and no end either; connections stay."""
        self._open.clear()

    def heal(self) -> None:
        """Let through what waited, and what comes."""
        self._open.set()

    async def stop(self) -> None:
        """End everything."""
        if self._listener is not None:
            self._listener.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._writers.add(writer)
        try:
            if self.refuse:
                return
            await self._turn()
            await self._joined(reader, writer)
        except (OSError, asyncio.CancelledError):
            return
        finally:
            self._writers.discard(writer)
            reset(writer)

    async def _turn(self) -> None:
        """Wait until as many as `turn_round` are there; then the last that came goes first."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        if len(self._turns) >= self.turn_round:
            turns, self._turns = self._turns, []
            for each in reversed(turns):
                if not each.done():
                    each.set_result(None)
        await turn

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self._target)

    async def _joined(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._open.wait()
        there_reader, there = await self._connect()
        self._writers.add(there)
        self.connections += 1
        try:
            pumps = [
                asyncio.create_task(self._pump(reader, there, None)),
                asyncio.create_task(
                    self._pump(there_reader, writer, None if self._through is None else self._through())
                ),
            ]
            try:
                await asyncio.gather(*pumps)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        finally:
            self._writers.discard(there)
            reset(there)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, through: Through | None) -> None:
        while data := await reader.read(READ_BYTES):
            await self._open.wait()
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            if through is not None:
                data = through(data)
            size = self.piece_bytes
            for at in range(0, len(data), size):
                writer.write(data[at : at + size])
                await writer.drain()
                if size < READ_BYTES:
                    await asyncio.sleep(0)
        await self._open.wait()
        with suppress(OSError):
            writer.write_eof()


class SocketProxy(TcpProxy):
    """The same before a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("", 0)
        self._path = path

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self._path)


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with RST."""
    raw = writer.get_extra_info("socket")
    if raw is not None:
        with suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
