"""The RPC server: gateways' connections, their requests, and exactly one answer to each.

    HELLO (credential, ring, shard, volume) → WELCOME, then requests with ids of the gateway's own

APPEND goes straight to the sequencer without a task of its own (it is the hot path); everything else runs as a task:
ownership → look at the term → work → answer.

Promise: every request is answered once, on its id, whatever happens inside; a payload that cannot be read is answered
INVALID and disturbs nobody else; a peer that does not begin with a good HELLO learns nothing. Every count is bounded.
Must not be done here: ordering, durability, ring maps.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import msgspec

from fleetlm_common import rpc
from fleetlm_common.decoding import UNREADABLE
from fleetlm_common.errors import FleetError, Invalid, Moved, TryAgain, Unauthenticated
from fleetlm_common.ids import SessionId, Slot, Term, checked_id
from fleetlm_common.logs import Logger
from fleetlm_common.rpc import Kind
from fleetlm_common.wire import FrameConnection, Turn
from fleetlm_shard.archive.inboxes import Inboxes
from fleetlm_shard.exporter import Exporter
from fleetlm_shard.log_types import LogError
from fleetlm_shard.ownership import Ownership
from fleetlm_shard.sequencer import Sequencer, refusal
from fleetlm_shard.service import Service
from fleetlm_shard.sessions import Sessions
from fleetlm_shard.subscriptions import BUFFERED_BYTES_MAX, Subscription, Subscriptions

HELLO_TIMEOUT_S: Final = 5.0
"""A connection that does not say who it is may not stay."""
SWEEP_S: Final = 1.0
"""How often connections are looked at."""
SILENT_SWEEPS_MAX: Final = 30
"""Gateways send a PING each second: one that was not heard for so long is gone, and its subscriptions with it."""
UNREAD_BYTES_MAX: Final = 64 * 1024 * 1024
"""Answers that a gateway has not taken. Streams end and reads are refused long before; only the answers to appends of a
peer that never reads come here, and a sweep sees it before it has grown by more than a second's worth."""
PAGES_MAX: Final = 32
"""Requests for pages that are worked on at once: with pages of 1 MiB this bounds their memory."""

Refusal = Callable[[], FleetError | None]
"""Why nothing is served now (starting, draining, stopped), if so."""

R = TypeVar("R", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class Handler(Generic[R]):
    """How one kind of request is read, done and answered."""

    decode: Callable[[bytes], R]
    reply: Kind
    serve: Callable[[R], Awaitable[msgspec.Struct]]


@dataclass(frozen=True, slots=True)
class Credentials:
    """Whom this shard is and what a gateway must present. `secret` is never shown."""

    ring_uid: str
    shard: str
    volume_id: str
    term: Term
    secret: bytes

    def __repr__(self) -> str:
        """Without the secret: reprs end up in logs."""
        return f"Credentials({self.shard!r})"

    def refusal(self, hello: rpc.Hello) -> FleetError | None:
        """Why this peer may not talk to this shard."""
        if not hmac.compare_digest(hello.credential, self.secret):
            return Unauthenticated("the credential is not this ring's", field="credential")
        for field, theirs, ours in (
            ("protocol", hello.protocol, rpc.PROTOCOL),
            ("ring_uid", hello.ring_uid, self.ring_uid),
            ("shard", hello.shard, self.shard),
            ("volume_id", hello.volume_id, self.volume_id),
        ):
            if theirs != ours:
                return Invalid(f"{field} is {ours!r} here, not {theirs!r}", field=field, reason="other_shard")
        return None


class Server:
    """All connections of one shard.

    Args:
        credentials: who may talk.
        service: requests about sessions.
        exporter: requests of other shards, to which slots move.
        sequencer: appends.
        sessions: hot state, for the hot path.
        ownership: which slots are served.
        subscriptions: streams.
        slot_of: the slot of a session id in this ring.
        refusal: asked at each request.
        log: for events.
        connections_max: gateways at once.
        requests_max: in flight on one connection.
    """

    def __init__(
        self,
        *,
        credentials: Credentials,
        service: Service,
        exporter: Exporter,
        inboxes: Inboxes,
        sequencer: Sequencer,
        sessions: Sessions,
        ownership: Ownership,
        subscriptions: Subscriptions,
        slot_of: Callable[[SessionId], Slot],
        refusal: Refusal,
        log: Logger,
        connections_max: int,
        requests_max: int,
    ) -> None:
        self.credentials = credentials
        self.service = service
        self.sequencer = sequencer
        self.sessions = sessions
        self.ownership = ownership
        self.subscriptions = subscriptions
        self.slot_of = slot_of
        self.refusal = refusal
        self.log = log
        self.requests_max = requests_max
        self.turn = Turn()
        self.paging = asyncio.Semaphore(PAGES_MAX)
        self.connections: dict[Connection, None] = {}
        self.refused = 0
        self.failed = 0
        self._connections_max = connections_max
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self.handlers: dict[int, Handler[Any]] = {
            Kind.READ: Handler(msgspec.msgpack.Decoder(rpc.Read).decode, Kind.PAGE, service.read),
            Kind.INFO: Handler(msgspec.msgpack.Decoder(rpc.Info).decode, Kind.INFO_OK, service.info),
            Kind.MARK_READ: Handler(msgspec.msgpack.Decoder(rpc.MarkRead).decode, Kind.MARKED, service.mark_read),
            Kind.CREATE: Handler(msgspec.msgpack.Decoder(rpc.Create).decode, Kind.CREATED, service.create),
            Kind.LIST: Handler(msgspec.msgpack.Decoder(rpc.List).decode, Kind.LISTED, service.list_sessions),
            Kind.PARTICIPATED: Handler(
                msgspec.msgpack.Decoder(rpc.Participated).decode, Kind.PARTICIPATED_OK, inboxes.participated
            ),
            Kind.INBOX: Handler(msgspec.msgpack.Decoder(rpc.Inbox).decode, Kind.INBOX_PAGE, inboxes.inbox),
            Kind.CHANGES: Handler(msgspec.msgpack.Decoder(rpc.Changes).decode, Kind.CHANGED, inboxes.changes),
            Kind.ENTRIES: Handler(msgspec.msgpack.Decoder(rpc.Entries).decode, Kind.ENTRIES_OK, inboxes.entries),
            Kind.EXPORT: Handler(msgspec.msgpack.Decoder(rpc.Export).decode, Kind.EXPORTED, exporter.export),
            Kind.EXPORT_CHANGED: Handler(
                msgspec.msgpack.Decoder(rpc.ExportChanged).decode, Kind.EXPORTED, exporter.changed
            ),
            Kind.EXPORT_MESSAGES: Handler(
                msgspec.msgpack.Decoder(rpc.ExportMessages).decode, Kind.EXPORTED_MESSAGES, exporter.messages
            ),
            Kind.EXPORT_SEALED: Handler(
                msgspec.msgpack.Decoder(rpc.ExportSealed).decode, Kind.EXPORTED_ALL, exporter.sealed
            ),
        }

    def protocol(self) -> FrameConnection:
        """A new connection's protocol, for `create_server`."""
        return Connection(self).wire

    def may_join(self) -> bool:
        """Whether one more connection is within the bound."""
        return len(self.connections) < self._connections_max

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run a request's task; it is bounded by the requests in flight."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def in_flight(self) -> int:
        """Requests without an answer."""
        return sum(each.in_flight for each in self.connections)

    def goaway(self, reason: str) -> None:
        """Tell every gateway that this shard is leaving, and end its subscriptions after their last push."""
        payload = rpc.encode(rpc.Goaway(reason))
        for connection in self.connections:
            connection.wire.send(Kind.GOAWAY, 0, payload)
        ended = rpc.Ended("draining", "", 0)
        self.subscriptions.end(iter(self.sessions.all_hot()), lambda _: ended)

    def close(self) -> None:
        """Send what is queued, then close every connection."""
        for connection in list(self.connections):
            connection.wire.close()

    async def sweep(self, sleep: Callable[[float], Awaitable[None]]) -> None:
        """Close connections that are silent, or that take no answers; runs until cancelled."""
        while True:
            await sleep(SWEEP_S)
            for connection in list(self.connections):
                why = connection.sweep()
                if why is not None:
                    self.log.event("gateway.dropped", level="warning", gateway=connection.gateway, why=why)
                    connection.wire.abort()


class Connection:
    """One gateway's connection; a `Peer` of its subscriptions."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.gateway = ""
        self.greeted = False
        self.in_flight = 0
        self.heard = True
        self.silent_sweeps = 0
        self.subscriptions: dict[int, Subscription] = {}
        self.subscribing: set[int] = set()
        """Ids of SUBSCRIBE requests that are being worked on; an UNSUBSCRIBE takes the id out."""
        self._on_appended = self._appended
        """Bound once, not for each append."""
        self.wire = FrameConnection(
            on_frame=self.on_frame, on_lost=self._on_lost, on_made=self._on_made, turn=server.turn
        )

    @property
    def buffered_bytes(self) -> int:
        """Bytes that the gateway has not taken."""
        return self.wire.buffered_bytes

    def send(self, kind: int, ident: int, payload: bytes) -> None:
        """Queue a frame."""
        self.wire.send(kind, ident, payload)

    def sweep(self) -> str | None:
        """Once each `SWEEP_S`: why this connection must end, if so."""
        self.silent_sweeps = 0 if self.heard else self.silent_sweeps + 1
        self.heard = False
        if self.silent_sweeps >= SILENT_SWEEPS_MAX:
            return "silent"
        return "does not read" if self.buffered_bytes > UNREAD_BYTES_MAX else None

    def _on_made(self, _: FrameConnection) -> None:
        if not self.server.may_join():
            self.server.log.event("gateway.refused", level="warning", why="too many connections")
            self.wire.abort()
            return
        self.server.connections[self] = None
        asyncio.get_running_loop().call_later(HELLO_TIMEOUT_S, self._expect_greeting)

    def _expect_greeting(self) -> None:
        if not self.greeted and not self.wire.closed:
            self.wire.abort()

    def _on_lost(self, _: Exception | None) -> None:
        self.server.connections.pop(self, None)
        self.server.subscriptions.drop(self)
        if self.greeted:
            self.server.log.event("gateway.gone", gateway=self.gateway)

    def on_frame(self, kind: int, ident: int, payload: bytes) -> None:
        """One frame; must not raise."""
        self.heard = True
        if not self.greeted:
            self._greet(kind, ident, payload)
        elif kind == _APPEND:
            self._append(ident, payload)
        elif kind == Kind.PING:
            self.wire.send(Kind.PONG, ident, b"")
        elif kind == Kind.UNSUBSCRIBE:
            self.subscribing.discard(ident)
            self.server.subscriptions.unsubscribe(self, ident)
        elif kind == Kind.SUBSCRIBE:
            self._subscribe(ident, payload)
        elif kind in self.server.handlers:
            self._request(self.server.handlers[kind], ident, payload)
        else:
            self._refuse(ident, Invalid(f"a shard takes no frame of kind {kind}", field="kind"))

    def _greet(self, kind: int, ident: int, payload: bytes) -> None:
        """The first frame says who is there; whoever fails learns why only about the credential, and is shown out."""
        server = self.server
        error: FleetError | None
        if kind != Kind.HELLO:
            error = Unauthenticated("the first frame must be HELLO", field="credential")
        else:
            try:
                hello = _decode_hello(payload)
            except UNREADABLE as broken:
                error = Invalid(f"HELLO cannot be read: {broken}", field="payload")
            else:
                error = server.credentials.refusal(hello)
                self.gateway = hello.gateway[:GATEWAY_CHARS_MAX]
        if error is not None:
            server.log.event("gateway.refused", level="warning", why=error.message, gateway=self.gateway)
            self._refuse(ident, error)
            self.wire.close()
            return
        self.greeted = True
        credentials = server.credentials
        self.wire.send(
            Kind.WELCOME,
            ident,
            rpc.encode(rpc.Welcome(rpc.PROTOCOL, credentials.shard, credentials.term, server.ownership.epoch)),
        )
        server.log.event("gateway.joined", gateway=self.gateway)

    def _admit(self, ident: int) -> bool:
        """Count the request in, or answer why not."""
        server = self.server
        error = server.refusal()
        if error is None and self.in_flight >= server.requests_max:
            error = TryAgain(f"more than {server.requests_max} requests in flight", reason="overloaded")
        if error is not None:
            self._refuse(ident, error)
            return False
        self.in_flight += 1
        return True

    def _append(self, ident: int, payload: bytes) -> None:
        """The hot path: no task, no look of its own (the batch's covers it)."""
        if not self._admit(ident):
            return
        server = self.server
        try:
            request = _decode_append(payload)
            session = server.sessions.hot(request.session)
            if session is None or session.slot not in server.ownership.serves:
                server.spawn(self._append_cold(ident, request, len(payload)))
            else:
                server.sequencer.append(session, request, ident, self._on_appended)
        except FleetError as error:
            self._answer_error(ident, error)
        except UNREADABLE as error:
            self._answer_error(ident, Invalid(f"APPEND cannot be read: {error}", field="payload"))

    async def _append_cold(self, ident: int, request: rpc.Append, size_bytes: int) -> None:
        """An append whose session is not in memory, or whose slot is not (yet) served here."""
        server = self.server

        async def append() -> None:
            slot = server.slot_of(SessionId(checked_id(request.session, "session_id")))
            keys = tuple(draft.key for entry in request.entries for draft in entry.drafts)
            await server.ownership.settle_write(
                slot, epoch=request.epoch, name=(request.session, keys), size_bytes=size_bytes
            )
            session = server.sessions.get(request.session)
            server.sequencer.append(session, request, ident, self._on_appended)

        await self._guard(ident, append())

    def _appended(self, ident: int, results: list[rpc.EntryResult]) -> None:
        self.in_flight -= 1
        self.wire.send(_APPENDED, ident, _encode(_Appended(results)))

    def _request(self, handler: Handler[Any], ident: int, payload: bytes) -> None:
        if not self._admit(ident):
            return

        async def serve() -> None:
            answer = await handler.serve(handler.decode(payload))
            self.in_flight -= 1
            self.wire.send(handler.reply, ident, rpc.encode(answer))

        async def serve_page() -> None:
            async with self.server.paging:
                if self.buffered_bytes > BUFFERED_BYTES_MAX:
                    raise TryAgain("this gateway does not read its answers", reason="overloaded")
                await serve()

        large = handler.reply in _PAGES
        self.server.spawn(self._guard(ident, serve_page() if large else serve()))

    def _subscribe(self, ident: int, payload: bytes) -> None:
        if ident in self.subscriptions or ident in self.subscribing:
            self._refuse(ident, Invalid("this id names a subscription already", field="id"))
            return
        if not self._admit(ident):
            return

        async def serve() -> None:
            request = _decode_subscribe(payload)
            session = await self.server.service.enter(request.session, request.epoch)
            if self.wire.closed or ident not in self.subscribing:
                # Unsubscribed, or gone, while we looked: nobody may be left to unsubscribe later.
                self.in_flight -= 1
                return
            self.server.subscriptions.subscribe(self, ident, session=session, after=request.after)
            self.in_flight -= 1

        async def guarded() -> None:
            try:
                await self._guard(ident, serve())
            finally:
                self.subscribing.discard(ident)

        self.subscribing.add(ident)
        self.server.spawn(guarded())

    async def _guard(self, ident: int, work: Coroutine[None, None, None]) -> None:
        """Do a request's work; whatever goes wrong becomes its one answer."""
        try:
            await work
        except FleetError as error:
            self._answer_error(ident, error)
        except LogError as error:
            self._answer_error(ident, refusal(error))
        except UNREADABLE as error:
            self._answer_error(ident, Invalid(f"the payload cannot be read: {error}", field="payload"))
        except MemoryError as error:
            # To the loop's handler, which ends the process (`outofmemory.py`): what this left half done is unknown.
            asyncio.get_running_loop().call_exception_handler({"message": "out of memory", "exception": error})
            raise
        except Exception as error:  # noqa: BLE001  a mistake of ours must not leave a request without its answer
            self.server.failed += 1
            self.server.log.event("request.failed", level="error", error=repr(error))
            self._answer_error(ident, TryAgain("the shard failed to answer; it has logged why", reason="unavailable"))

    def _answer_error(self, ident: int, error: FleetError) -> None:
        self.in_flight -= 1
        self._refuse(ident, error)

    def _refuse(self, ident: int, error: FleetError) -> None:
        self.server.refused += 1
        if isinstance(error, Moved):
            self.wire.send(Kind.MOVED, ident, rpc.encode(rpc.MovedBody(error.owner, error.epoch)))
        else:
            self.wire.send(Kind.ERROR, ident, rpc.encode(error.body()))


GATEWAY_CHARS_MAX: Final = 128
"""Of a gateway's name in events."""

_PAGES: Final = frozenset({Kind.PAGE, Kind.LISTED, Kind.INBOX_PAGE, Kind.CHANGED, Kind.ENTRIES_OK})
_APPEND: Final = int(Kind.APPEND)
_APPENDED: Final = int(Kind.APPENDED)
"""Asking an enum for a member takes 0.2 µs in Python 3.11; these two are asked for once an append."""
_Appended = rpc.Appended
_encode = rpc.encode
_decode_append = msgspec.msgpack.Decoder(rpc.Append).decode
_decode_hello = msgspec.msgpack.Decoder(rpc.Hello).decode
_decode_subscribe = msgspec.msgpack.Decoder(rpc.Subscribe).decode
