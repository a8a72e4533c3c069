"""A TCP proxy on loopback whose connections can be cut: real broken connections, at a moment that the test chooses."""

from __future__ import annotations

import asyncio
from types import TracebackType


class CutProxy:
    """Passes bytes to 127.0.0.1:`target`; an asynchronous context.

    Attributes:
        port: where it listens, also after `close` and `open`.
        cuts: connections that were cut.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.cuts = 0

    async def __aenter__(self) -> CutProxy:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def open(self) -> None:
        """Listen (again)."""
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Break every connection; new ones are taken."""
        for writer in self._open:
            writer.transport.abort()
            self.cuts += 1
        self._open.clear()

    def close(self) -> None:
        """Refuse new connections and break the old ones."""
        if self._server is not None:
            self._server.close()
        self.cut()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, far_writer}
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(_passed_on(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


async def _passed_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Bytes one way until either end is gone, which ends the other."""
    try:
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
    except OSError:
        return
    finally:
        sink.transport.abort()
