"""The bench's own RPC connection to a shard of a local ring: fills a volume quickly, and reads it back page by page.

Promise: what `fill` returns from is on disk; what `read` counts was contiguous. Must not be done here: choosing what is
written, starting processes.
"""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Final

import msgspec

from fleetlm_cli.benchload import BenchError
from fleetlm_common import rpc
from fleetlm_common.filecontrol import FileControlPlane
from fleetlm_common.ids import ShardName
from fleetlm_common.rpc import Kind
from fleetlm_common.wire import FrameConnection

WINDOW: Final = 512
"""Appends under way while filling."""
TIMEOUT_S: Final = 60.0
PAGE: Final = 1_000


class ShardWire:
    """One connection to `shard-0`."""

    def __init__(self) -> None:
        self._wire = FrameConnection(on_frame=self._on_frame, on_lost=self._on_lost)
        self._answers: dict[int, asyncio.Future[tuple[int, bytes]]] = {}
        self._idents = itertools.count(1)
        self._epoch = 0

    @classmethod
    async def open(cls, data: Path) -> ShardWire:
        """Connect and say HELLO.

        Raises:
            BenchError: the shard refused.
        """
        view = await FileControlPlane(data / "control", poll_interval_s=1.0).read()
        name, spec = ShardName("shard-0"), view.spec
        endpoint = view.shards.get(name)
        if endpoint is None or view.map is None:
            raise BenchError(f"{data} has no shard-0 yet")
        self = cls()
        host, port = endpoint.host, endpoint.port
        await asyncio.get_running_loop().create_connection(lambda: self._wire, host, port)
        secret = (data / "credential").read_bytes().strip()
        hello = rpc.Hello(rpc.PROTOCOL, spec.uid, name, endpoint.volume_id, "bench", secret, view.map.epoch)
        kind, payload = await self.ask(Kind.HELLO, hello)
        if kind != Kind.WELCOME:
            raise BenchError(f"shard-0 refused: {payload!r}")
        self._epoch = msgspec.msgpack.decode(payload, type=rpc.Welcome).epoch
        return self

    def send(self, kind: Kind, body: msgspec.Struct) -> asyncio.Future[tuple[int, bytes]]:
        """Send; the future is the answer."""
        ident = next(self._idents)
        answer: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._answers[ident] = answer
        self._wire.send(kind, ident, rpc.encode(body))
        return answer

    async def ask(self, kind: Kind, body: msgspec.Struct) -> tuple[int, bytes]:
        """Send and wait."""
        async with asyncio.timeout(TIMEOUT_S):
            return await self.send(kind, body)

    async def fill(self, sessions: list[str], *, messages: int, size_bytes: int, batch: int = 50) -> None:
        """Append so many messages to each session, `batch` a request.

        Raises:
            BenchError: one was refused.
        """
        fragment = (
            '"sender_id":"bench","sender_kind":"agent","kind":"message","content":"' + "x" * (size_bytes - 2)
        ).encode() + b'","metadata":{}'
        under_way: set[asyncio.Future[tuple[int, bytes]]] = set()
        window = max(2, min(WINDOW, 8 * 1024 * 1024 // (batch * size_bytes)))
        for begin in range(0, messages, batch):
            count = min(batch, messages - begin)
            for session in sessions:
                drafts = [rpc.Draft(f"{session}-{begin + number}", fragment) for number in range(count)]
                under_way.add(self.send(Kind.APPEND, rpc.Append(self._epoch, session, [rpc.Entry(drafts)])))
                if len(under_way) >= window:
                    done, under_way = await asyncio.wait(under_way, return_when="FIRST_COMPLETED", timeout=TIMEOUT_S)
                    _appended(done)
        if under_way:
            done, under_way = await asyncio.wait(under_way, timeout=TIMEOUT_S)
            _appended(done)
        if under_way:
            raise BenchError(f"{len(under_way)} appends were not answered")

    async def read(self, session: str) -> int:
        """Read a session from its first message to its last; how many.

        Raises:
            BenchError: it was refused, or a message is missing.
        """
        after = 0
        while True:
            kind, payload = await self.ask(Kind.READ, rpc.Read(self._epoch, session, PAGE, after))
            if kind != Kind.PAGE:
                raise BenchError(f"READ was refused: {payload!r}")
            page = msgspec.msgpack.decode(payload, type=rpc.Page)
            if page.gap is not None or (page.messages and page.first_seq != after + 1):
                raise BenchError(f"{session} has a gap after {after}")
            after += len(page.messages)
            if not page.has_more:
                return after

    def close(self) -> None:
        """Close."""
        self._wire.close()

    def _on_frame(self, kind: int, ident: int, payload: bytes) -> None:
        answer = self._answers.pop(ident, None) or (self._answers.popitem()[1] if kind == Kind.ERROR else None)
        if answer is not None and not answer.done():
            answer.set_result((kind, payload))

    def _on_lost(self, error: Exception | None) -> None:
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(BenchError(f"the connection to shard-0 ended: {error}"))
        self._answers.clear()


def _appended(done: set[asyncio.Future[tuple[int, bytes]]]) -> None:
    if not done:
        raise BenchError("appends were not answered in time")
    for future in done:
        kind, payload = future.result()
        if kind != Kind.APPENDED:
            raise BenchError(f"an append was refused: {payload!r}")
        for result in msgspec.msgpack.decode(payload, type=rpc.Appended).results:
            if result.error is not None:
                raise BenchError(f"an append was refused: {result.error}")
