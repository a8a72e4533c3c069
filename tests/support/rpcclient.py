"""A small RPC client for tests: says what it is told to a shard, over real sockets, and hears everything.

    async with await RpcClient.connect(host, port, hello) as client:
        ack = await client.append("s", "hello")
        page = await client.read("s", after=0)
        sub = await client.subscribe("s", after=0); push = await sub.next()

Promise: `request` resolves with the frame that answered its id, whatever it is; frames that nobody waits for are kept.
Must not be done here: retries, ring maps.
"""

from __future__ import annotations

import asyncio
import itertools
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from fleetlm_common import rpc
from fleetlm_common.errors import ErrorBody, FleetError, Moved, from_body
from fleetlm_common.rpc import Kind
from fleetlm_common.wire import FrameConnection

ANSWER_S = 10.0
"""Nothing that a test asks for may take longer."""

P = TypeVar("P", bound=msgspec.Struct)


def fragment(text: str, *, sender: str = "alice", kind: str = "message", metadata: str = "{}") -> bytes:
    """A message's fragment as a gateway makes it; `text` becomes the content, as a JSON string."""
    content = msgspec.json.encode(text).decode()
    return (
        f'"sender_id":"{sender}","sender_kind":"human","kind":"{kind}","content":{content},"metadata":{metadata}'
    ).encode()


def draft(text: str, *, key: str | None = None) -> rpc.Draft:
    """A draft whose key is its text (the first 60 characters of it) unless told otherwise."""
    return rpc.Draft(text[:60] if key is None else key, fragment(text))


class Stream:
    """Frames on a subscription's id, in order."""

    def __init__(self, ident: int, subscribed: rpc.Subscribed) -> None:
        self.ident = ident
        self.subscribed = subscribed
        self.frames: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()

    async def frame(self) -> tuple[int, bytes]:
        """The next frame: kind and payload."""
        return await asyncio.wait_for(self.frames.get(), ANSWER_S)

    async def next(self) -> tuple[int, list[dict[str, object]]]:
        """The next PUSH: first seq and messages."""
        kind, payload = await self.frame()
        assert kind == Kind.PUSH, f"expected a PUSH, got kind {kind}"
        push = msgspec.msgpack.decode(payload, type=rpc.Push)
        messages = msgspec.json.decode(b"[" + push.body + b"]", type=list[dict[str, object]])
        assert len(messages) == push.count
        return push.first_seq, messages


class RpcClient:
    """One connection to one shard."""

    def __init__(self) -> None:
        self.wire = FrameConnection(on_frame=self._on_frame, on_lost=self._on_lost)
        self.other: list[tuple[int, int, bytes]] = []
        """Frames that nobody waited for: (kind, id, payload)."""
        self.lost = asyncio.Event()
        self.goaway = asyncio.Event()
        self.epoch = 0
        self._idents = itertools.count(1)
        self._answers: dict[int, asyncio.Future[tuple[int, bytes]]] = {}
        self._streams: dict[int, Stream] = {}

    @classmethod
    async def open(cls, host: str, port: int) -> Self:
        """A connection without HELLO."""
        client = cls()
        await asyncio.get_running_loop().create_connection(lambda: client.wire, host, port)
        return client

    @classmethod
    async def connect(cls, host: str, port: int, hello: rpc.Hello) -> Self:
        """A connection that has said HELLO and heard WELCOME.

        Raises:
            FleetError: the shard refused.
        """
        client = await cls.open(host, port)
        welcome = await client.ask(Kind.HELLO, hello, rpc.Welcome)
        client.epoch = welcome.epoch
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close and wait for the end."""
        self.wire.close()
        await asyncio.wait_for(self.lost.wait(), ANSWER_S)

    def send(self, kind: int, payload: bytes) -> asyncio.Future[tuple[int, bytes]]:
        """Send a frame with an id of its own; the future is its answer (kind, payload)."""
        ident = next(self._idents)
        future: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._answers[ident] = future
        self.wire.send(kind, ident, payload)
        return future

    async def request(self, kind: int, payload: bytes) -> tuple[int, bytes]:
        """Send and wait.

        Raises:
            ConnectionError: the connection ended first.
        """
        return await asyncio.wait_for(self.send(kind, payload), ANSWER_S)

    async def ask(self, kind: int, body: msgspec.Struct, reply: type[P]) -> P:
        """Send and wait for the reply that belongs to the request.

        Raises:
            FleetError: the shard refused (also `Moved`).
        """
        got, payload = await self.request(kind, rpc.encode(body))
        if got in {Kind.ERROR, Kind.MOVED}:
            raise refused(got, payload)
        return msgspec.msgpack.decode(payload, type=reply)

    async def append_entries(self, session: str, *entries: rpc.Entry) -> list[rpc.EntryResult]:
        """One APPEND."""
        request = rpc.Append(self.epoch, session, list(entries))
        return (await self.ask(Kind.APPEND, request, rpc.Appended)).results

    async def append(
        self, session: str, *texts: str, key: str | None = None, expected_seq: int | None = None
    ) -> list[rpc.Ack]:
        """One entry of texts.

        Raises:
            FleetError: the entry was refused.
        """
        entry = rpc.Entry([draft(text, key=key) for text in texts], expected_seq)
        [result] = await self.append_entries(session, entry)
        if result.error is not None:
            raise from_body(result.error)
        return result.acks

    async def read(
        self,
        session: str,
        *,
        after: int | None = None,
        before: int | None = None,
        tail: int | None = None,
        limit: int = 1000,
    ) -> rpc.Page:
        """One page."""
        return await self.ask(Kind.READ, rpc.Read(self.epoch, session, limit, after, before, tail), rpc.Page)

    async def read_all(self, session: str, *, after: int = 0) -> list[dict[str, object]]:
        """All messages after `after`, page by page; a gap fails."""
        messages: list[dict[str, object]] = []
        while True:
            page = await self.read(session, after=after)
            assert page.gap is None, f"gap {page.gap}"
            messages += [msgspec.json.decode(each) for each in page.messages]
            if not page.has_more:
                return messages
            after = page.first_seq + len(page.messages) - 1

    async def info(self, session: str, *, cursor: int | None = None) -> rpc.InfoOk:
        """A session as it is."""
        return await self.ask(Kind.INFO, rpc.Info(self.epoch, session, cursor), rpc.InfoOk)

    async def mark_read(self, session: str, participant: str, seq: int) -> int:
        """Move a read cursor."""
        body = rpc.MarkRead(self.epoch, session, participant, seq)
        return (await self.ask(Kind.MARK_READ, body, rpc.Marked)).last_read_seq

    async def create(self, session: str, metadata: bytes = b"{}") -> rpc.Created:
        """Make a session."""
        return await self.ask(Kind.CREATE, rpc.Create(self.epoch, session, metadata), rpc.Created)

    async def subscribe(self, session: str, *, after: int | None = None) -> Stream:
        """Listen to a session.

        Raises:
            FleetError: the shard refused.
        """
        ident = next(self._idents)
        answer: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._answers[ident] = answer
        stream = Stream(ident, rpc.Subscribed(0, 0))
        self._streams[ident] = stream
        self.wire.send(Kind.SUBSCRIBE, ident, rpc.encode(rpc.Subscribe(self.epoch, session, after)))
        kind, payload = await asyncio.wait_for(answer, ANSWER_S)
        if kind != Kind.SUBSCRIBED:
            raise refused(kind, payload)
        stream.subscribed = msgspec.msgpack.decode(payload, type=rpc.Subscribed)
        return stream

    def unsubscribe(self, stream: Stream) -> None:
        """Stop listening."""
        self.wire.send(Kind.UNSUBSCRIBE, stream.ident, b"")

    def _on_frame(self, kind: int, ident: int, payload: bytes) -> None:
        if kind == Kind.GOAWAY:
            self.goaway.set()
        answer = self._answers.pop(ident, None)
        if answer is not None:
            if not answer.done():
                answer.set_result((kind, payload))
        elif ident in self._streams:
            self._streams[ident].frames.put_nowait((kind, payload))
        else:
            self.other.append((kind, ident, payload))

    def _on_lost(self, error: Exception | None) -> None:
        self.lost.set()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ConnectionError(f"the connection ended: {error}"))
                # A test may not wait for it any more.
                answer.exception()
        self._answers.clear()


def refused(kind: int, payload: bytes) -> FleetError:
    """The refusal in an ERROR or MOVED frame."""
    if kind == Kind.MOVED:
        moved = msgspec.msgpack.decode(payload, type=rpc.MovedBody)
        return Moved(owner=moved.owner, epoch=moved.epoch)
    assert kind == Kind.ERROR, f"an answer of kind {kind} nobody expected"
    return from_body(msgspec.msgpack.decode(payload, type=ErrorBody))
