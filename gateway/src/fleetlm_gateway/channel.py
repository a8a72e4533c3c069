"""One joined topic of one socket: its requests in order, its place in the session, its pushes.

Promise: every request is answered once, on its ref. Requests of a channel take effect in the order in which they came:
appends go out at once, one behind the other (the session's lane keeps their order); `replay` and `mark_read` wait for
what came before them, and what comes after waits for them. The join's reply precedes its pushes.
Must not be done here: bytes of the socket (`websocket.py`), order of appends over retries (`lanes.py`).

A channel that is left or replaced sends no pushes any more; requests that it took are still answered.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from fleetlm_common import rpc
from fleetlm_common.errors import FleetError, Invalid, NotFound, TryAgain
from fleetlm_common.ids import SessionId
from fleetlm_gateway import drafts, payloads, phoenix
from fleetlm_gateway.boundary import Start, Subscription
from fleetlm_gateway.jsontext import encode

if TYPE_CHECKING:
    from fleetlm_gateway.websocket import Socket

APPEND: Final = "append"
REPLAY: Final = "replay"
MARK_READ: Final = "mark_read"
EVENTS: Final = frozenset((APPEND, REPLAY, MARK_READ))
"""What may be asked on a joined topic, besides leaving it."""
_SHOWN_CHARS_MAX: Final = 60
"""Of a client's own words in an answer."""


class Request(msgspec.Struct, frozen=True, gc=False):
    """What a client waits for: where the answer goes, and what it costs to hold."""

    event: str
    join_ref: bytes
    ref: bytes
    topic: bytes
    size_bytes: int
    started_s: float


def unmatched(topic: str) -> NotFound:
    """The answer to a request on a topic that is not joined (with phoenix's own words as the reason)."""
    return NotFound(f"topic {topic[:_SHOWN_CHARS_MAX]!r} is not joined on this socket", reason="unmatched topic")


def superseded() -> Invalid:
    """The answer to a join that is not waited for any more."""
    return Invalid("the topic was left or joined again before this join was done", reason="superseded")


class Channel:
    """A `Sink` for one subscription.

    Args:
        socket: whose it is.
        session: what `topic` names.
        topic: as the client wrote it.
        join: the request that makes it; `join_ref` of everything that follows.
        start: where it begins.
    """

    __slots__ = (
        "_advancing",
        "_appends",
        "_busy",
        "_head",
        "_join",
        "_joining",
        "_session",
        "_socket",
        "_start_at",
        "_subscription",
        "_topic",
        "_waiting",
        "join_ref",
        "text",
    )

    def __init__(self, socket: Socket, *, session: SessionId, topic: str, join: Request, start: Start) -> None:
        self._socket = socket
        self._session = session
        self._topic = topic
        self.text = join.topic
        self.join_ref = join.join_ref
        self._join: Request | None = join
        self._start_at = start
        self._head = phoenix.messages_head(self.join_ref, self.text)
        self._joining: asyncio.Task[None] | None = None
        self._subscription: Subscription | None = None
        self._appends = 0
        self._busy = True
        self._advancing = False
        self._waiting: deque[tuple[Request, bytes]] = deque()

    # -- joining and leaving

    def open(self) -> None:
        """Begin to join; what comes meanwhile waits."""
        self._joining = self._socket.spawn(self._open())

    async def _open(self) -> None:
        socket = self._socket
        try:
            subscription = await socket.hub.boundary.subscribe(self._session, start=self._start_at, sink=self)
        except FleetError as error:
            socket.forget(self)
            self._give_up_joining(error)
            return
        join, self._join, self._joining = self._join, None, None
        assert join is not None
        self._subscription = subscription
        info = subscription.info
        reply = payloads.JoinReply(self._session, info.epoch, info.last_seq, info.earliest_seq)
        socket.answer_ok(join, encode(reply))
        socket.hub.metrics.topics.inc()
        subscription.begin()
        if socket.hub.draining:
            self.announce_drain(socket.hub.retry_after_ms)
        self._busy = False
        self._advance()

    def close(self) -> None:
        """End the subscription; harmless when repeated."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            subscription.close()
            self._socket.hub.metrics.topics.dec()
        if self._joining is not None:
            self._joining.cancel()
            self._give_up_joining(superseded())

    def _give_up_joining(self, error: FleetError) -> None:
        join, self._join, self._joining = self._join, None, None
        if join is not None:
            self._socket.answer_error(join, error)
        while self._waiting:
            self._socket.answer_error(self._waiting.popleft()[0], unmatched(self._topic))

    # -- requests

    def handle(self, request: Request, payload: bytes | None) -> None:
        """Take a request; it is answered now or later, once."""
        if request.event not in EVENTS:
            names = ", ".join(sorted(EVENTS))
            self._socket.answer_error(
                request, Invalid(f"a session topic knows the events {names}", reason="unknown_event", field="event")
            )
        elif payload is None:
            self._socket.answer_error(request, malformed_payload())
        elif self._waiting or self._busy or (self._appends and request.event != APPEND):
            self._waiting.append((request, payload))
        else:
            self._start(request, payload)

    def _start(self, request: Request, payload: bytes) -> None:
        if request.event == APPEND:
            self._append(request, payload)
            return
        work: Callable[[], Awaitable[bytes]]
        try:
            if request.event == REPLAY:
                work = partial(self._page, payloads.replay(payload))
            else:
                work = partial(self._marked, payloads.mark_read(payload))
        except FleetError as error:
            self._socket.answer_error(request, error)
            return
        self._busy = True
        self._socket.spawn(self._serve(request, work))

    def _append(self, request: Request, payload: bytes) -> None:
        socket = self._socket
        hub = socket.hub
        try:
            parsed = drafts.parse(payload, sender=socket.principal, keys=hub.keys)
        except FleetError as error:
            socket.answer_error(request, error)
            return
        self._appends += 1
        hub.boundary.append_then(
            self._session,
            parsed.drafts,
            expected_seq=parsed.expected_seq,
            done=partial(self._appended, request, parsed.batch),
        )

    def _appended(self, request: Request, batch: bool, outcome: list[rpc.Ack] | FleetError) -> None:
        self._appends -= 1
        if isinstance(outcome, FleetError):
            self._socket.answer_error(request, outcome)
        else:
            body = payloads.acks_body(outcome) if batch else payloads.ack_body(outcome[0])
            self._socket.answer_ok(request, body)
        if self._waiting:
            self._advance()

    async def _page(self, asked: payloads.Replay) -> bytes:
        socket = self._socket
        # A page is large: few at a time, and none for a socket that does not take what it has.
        async with socket.pages:
            await socket.out.room()
            page = await socket.hub.boundary.read(
                self._session, after=asked.after, before=asked.before, limit=asked.limit
            )
            return payloads.page_body(page)

    async def _marked(self, seq: int) -> bytes:
        marked = await self._socket.hub.boundary.mark_read(self._session, self._socket.principal.id, seq)
        return b'{"last_read_seq":%d}' % marked

    async def _serve(self, request: Request, work: Callable[[], Awaitable[bytes]]) -> None:
        try:
            self._socket.answer_ok(request, await work())
        except FleetError as error:
            self._socket.answer_error(request, error)
        self._busy = False
        self._advance()

    def _advance(self) -> None:
        """Start what waits, as far as order lets it."""
        if self._advancing:
            return
        self._advancing = True
        waiting = self._waiting
        while waiting and not self._busy and (waiting[0][0].event == APPEND or not self._appends):
            self._start(*waiting.popleft())
        self._advancing = False

    # -- the sink

    def deliver(self, first_seq: int, count: int, body: bytes, /) -> bool:
        """Push messages, unless the socket is full."""
        socket = self._socket
        if socket.out.is_full():
            socket.out.starve(self)
            return False
        socket.out.send_messages(self._head, body)
        socket.hub.metrics.delivered.inc(count)
        return True

    def gap(self, gap: rpc.Gap, /) -> None:
        """Push what is missing."""
        self._push(b"gap", payloads.gap_body(gap))
        self._socket.hub.metrics.gaps.inc()

    def caught_up(self, seq: int, /) -> None:
        """Push that replay has met live."""
        self._push(b"caught_up", b'{"seq":%d}' % seq)

    def read(self, participant: str, last_read_seq: int, /) -> None:
        """Push a read cursor, unless the socket is full: it is a hint, and the next one says more."""
        if self._socket.out.is_full():
            self._socket.hub.metrics.hints_dropped.inc()
            return
        self._push(b"read", payloads.read_body(participant, last_read_seq))

    def closed(self, reason: str, /) -> None:
        """The subscription ended by itself: `phx_error`, on which phoenix clients join again."""
        if self._subscription is None:
            return
        self._subscription = None
        socket = self._socket
        socket.hub.metrics.topics.dec()
        socket.forget(self)
        error: FleetError = TryAgain("the subscription ended, join again", reason="unavailable")
        if reason == "cursor_ahead":
            error = Invalid("the ring does not hold what this reader has seen", reason=reason, field="cursor")
        elif reason == "draining":
            error = TryAgain("this gateway is leaving", reason="draining", retry_after_ms=socket.hub.retry_after_ms)
        socket.out.send(phoenix.ended(self.join_ref, self.text, b"phx_error", payloads.error_body(error)))

    def resume(self) -> None:
        """There is room again."""
        if self._subscription is not None:
            self._subscription.resume()

    def announce_drain(self, retry_after_ms: int) -> None:
        """Push that this gateway is leaving, if the topic is joined (a join under way pushes it when it is done)."""
        if self._subscription is not None:
            self._push(b"draining", b'{"retry_after_ms":%d}' % retry_after_ms)

    def _push(self, event: bytes, payload: bytes) -> None:
        self._socket.out.send(phoenix.push(self.join_ref, self.text, event, payload))


def malformed_payload() -> Invalid:
    """The answer to a frame whose head can be read and whose payload cannot."""
    return Invalid(
        "payload is not JSON that can be read: wrong syntax, a lone surrogate, or nested too deeply",
        reason="malformed_json",
        field="payload",
    )
