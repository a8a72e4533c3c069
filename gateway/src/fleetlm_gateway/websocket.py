"""One client's WebSocket: bytes in and out, routing of frames to channels, limits, and its end.

Callbacks, not tasks: a frame is read, routed and (an append) handed on within `data_received`. A socket that does not
take what it is sent is *full* (`outflow.py`): nothing more is read from it, and it is closed when that lasts.

Promise: memory of a socket is bounded by `write_buffer_bytes`, one page for each of `PAGES_MAX` and
`request_bytes_per_socket`; nothing that one client sends or does not read disturbs another; every request is answered
once on its ref while the socket lives; whatever ends it has a close code of `closing.py`.
Must not be done here: sessions (`channel.py`), bytes (`wsframes.py`, `phoenix.py`, `outflow.py`), who may connect.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Final, cast

from fleetlm_common.errors import FleetError, Forbidden, Invalid, TryAgain
from fleetlm_common.ids import SessionId, checked_id
from fleetlm_common.limits import FRAME_BYTES_MAX
from fleetlm_gateway import closing, payloads, phoenix, wsframes
from fleetlm_gateway.channel import EVENTS, Channel, Request, malformed_payload, unmatched
from fleetlm_gateway.closing import CloseReason
from fleetlm_gateway.inboxchannel import InboxChannel
from fleetlm_gateway.outflow import Outflow

if TYPE_CHECKING:
    from fleetlm_gateway.hub import Hub
    from fleetlm_gateway.principal import Principal

PAGES_MAX: Final = 4
"""Replay pages of one socket under way at once: each may be a mebibyte."""
FRAMES_PER_TURN_MAX: Final = 128
"""Frames handled before other sockets have their turn: about a millisecond of work."""
CLOSE_LINGER_S: Final = 2.0
"""From our close frame to the end of the connection, if the client does not end it: a round trip, generously."""
_SESSION_TOPIC: Final = "session:"
_INBOX_TOPIC: Final = "inbox:"
_LABELS: Final = EVENTS | {"phx_join", "phx_leave", "heartbeat"}
_EMPTY: Final = b"{}"

AnyChannel = Channel | InboxChannel


class Socket(asyncio.Protocol):
    """The protocol of a connection after its upgrade.

    Args:
        hub: what all sockets of this gateway share.
        principal: who speaks.
    """

    __slots__ = (
        "_closing",
        "_deaf",
        "_finishing",
        "_heard_s",
        "_loop",
        "_outstanding",
        "_outstanding_bytes",
        "_reader",
        "_refilled_s",
        "_tasks",
        "_timer",
        "_tokens",
        "_transport",
        "channels",
        "hub",
        "out",
        "pages",
        "principal",
    )

    def __init__(self, hub: Hub, principal: Principal) -> None:
        self.hub = hub
        self.principal = principal
        self.channels: dict[str, AnyChannel] = {}
        self.out = Outflow(hub, on_room=self._refill)
        self.pages = asyncio.Semaphore(PAGES_MAX)
        self._loop = asyncio.get_running_loop()
        self._reader = wsframes.Reader(frame_bytes_max=FRAME_BYTES_MAX)
        self._transport: asyncio.Transport | None = None
        self._outstanding = 0
        self._outstanding_bytes = 0
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._heard_s = self._refilled_s = hub.clock.monotonic_s()
        self._tokens = float(hub.config.frames_burst)
        self._timer: asyncio.TimerHandle | None = None
        self._closing: CloseReason | None = None
        self._finishing = False
        self._deaf = False

    # -- asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The upgrade is done."""
        # uvloop's transports are no subclasses of asyncio's: a cast, never an isinstance.
        self._transport = cast("asyncio.Transport", transport)
        self.out.open(self._transport)
        self.hub.add(self)
        self._arm(self.hub.config.heartbeat_timeout_ms / 1000)

    def data_received(self, data: bytes) -> None:
        """Bytes arrived."""
        now_s = self.hub.clock.monotonic_s()
        self._heard_s = now_s
        self.hub.metrics.bytes_received.inc(len(data))
        if not self._deaf:
            self._reader.feed(data)
            self._pump(now_s)

    def eof_received(self) -> None:
        """The client sends no more; asyncio closes, and what it does not take within the linger is dropped."""
        self._end()

    def pause_writing(self) -> None:
        """More than `write_buffer_bytes` wait: nothing more is read from who does not take what it has."""
        if self._transport is None:
            return
        self.out.filled()
        if self._closing is None:
            self._transport.pause_reading()
            self._arm(self._stall_look_s())

    def resume_writing(self) -> None:
        """Most of it has left."""
        self.out.drained()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
        self.out.lost()
        self._end_channels()
        self.hub.forget(self, "lost" if self._closing is None else self._closing.name)

    # -- reading

    def _pump(self, now_s: float) -> None:
        """Handle what has arrived whole, until the socket is full or closing."""
        reader, config = self._reader, self.hub.config
        rate, burst = config.frames_per_second, config.frames_burst
        self._tokens = min(burst, self._tokens + (now_s - self._refilled_s) * rate)
        self._refilled_s = now_s
        counted = begun = reader.frames
        try:
            while not self.out.full or self._closing is not None:
                found = reader.next()
                self._tokens -= reader.frames - counted
                counted = reader.frames
                if found is None:
                    break
                self._on_frame(*found, now_s)
                if counted - begun >= FRAMES_PER_TURN_MAX and self._closing is None:
                    self._yield_turn()
                    break
        except wsframes.Violation as error:
            self._deaf = True
            self.close(closing.WEBSOCKET, str(error))
        except wsframes.Oversize:
            self._deaf = True
            self.close(closing.FRAME_TOO_LARGE)
        if counted != begun:
            self.hub.metrics.frames.inc(counted - begun)
        if self._tokens < -burst:
            self.close(closing.RATE_LIMITED)

    def _yield_turn(self) -> None:
        """Go on with what has arrived in the next turn of the loop; until then nothing more is read."""
        if self._transport is not None:
            self._transport.pause_reading()
            self._loop.call_soon(self._refill)

    def _on_frame(self, opcode: int, payload: bytes, now_s: float) -> None:
        if opcode == wsframes.CLOSE:
            self._on_close(payload)
        elif self._closing is not None:
            return
        elif opcode == wsframes.TEXT:
            self._on_text(payload, now_s)
            self.out.flush_if_much()
        elif opcode == wsframes.BINARY:
            self.close(closing.BINARY)
        elif opcode == wsframes.PING:
            self.out.write(wsframes.control(wsframes.PONG, payload))

    def _on_text(self, data: bytes, now_s: float) -> None:
        try:
            frame = phoenix.decode(data)
        except phoenix.Malformed as error:
            self.close(closing.MALFORMED, str(error))
            return
        channel = self.channels.get(frame.topic)
        topic = phoenix.topic_text(frame.topic) if channel is None else channel.text
        label = frame.event if frame.event in _LABELS else "other"
        request = Request(label, frame.join_ref, frame.ref, topic, len(data), now_s)
        refusal = self._refusal(request)
        self._outstanding += 1
        self._outstanding_bytes += request.size_bytes
        if refusal is not None:
            self.answer_error(request, refusal)
        else:
            self._route(request, frame, channel)

    def _refusal(self, request: Request) -> FleetError | None:
        """Why no further request is taken now, if so."""
        config = self.hub.config
        if self._tokens < 0:
            self.hub.metrics.rate_limited.inc()
            wait_ms = math.ceil(-self._tokens * 1000 / config.frames_per_second)
            what = f"more than {config.frames_per_second} frames a second"
            return TryAgain(what, reason="overloaded", retry_after_ms=max(wait_ms, 1))
        if (
            self._outstanding >= config.requests_per_socket
            or self._outstanding_bytes + request.size_bytes > config.request_bytes_per_socket
        ):
            return TryAgain("too many requests of this socket are under way", reason="overloaded")
        if self._finishing and request.event != "heartbeat":
            return TryAgain("this gateway is leaving", reason="draining", retry_after_ms=self.hub.retry_after_ms)
        return None

    def _route(self, request: Request, frame: phoenix.Frame, channel: AnyChannel | None) -> None:
        if frame.event == "phx_join":
            self._join(request, frame, channel)
        elif frame.topic == "phoenix":
            self._on_phoenix(request)
        elif channel is None or frame.join_ref not in (channel.join_ref, phoenix.NULL):
            # A leave that crossed our own close (or the join that replaced it) has what it wants.
            if frame.event == "phx_leave":
                self.answer_ok(request, _EMPTY)
            else:
                self.answer_error(request, unmatched(frame.topic))
        elif frame.event == "phx_leave":
            self._end_channel(channel, frame.topic)
            self.answer_ok(request, _EMPTY)
            self.out.send(phoenix.ended(channel.join_ref, channel.text, b"phx_close"))
        else:
            channel.handle(request, frame.payload)

    def _on_phoenix(self, request: Request) -> None:
        if request.event == "heartbeat":
            self.answer_ok(request, _EMPTY)
        else:
            error = Invalid("topic phoenix knows the event heartbeat", reason="unknown_event", field="event")
            self.answer_error(request, error)

    def _join(self, request: Request, frame: phoenix.Frame, elder: AnyChannel | None) -> None:
        try:
            channel = self._channel(request, frame)
            if self.hub.draining:
                raise TryAgain("this gateway is leaving", reason="draining", retry_after_ms=self.hub.retry_after_ms)
            if elder is None and len(self.channels) >= self.hub.config.topics_per_socket:
                limit = self.hub.config.topics_per_socket
                raise TryAgain(f"{limit} topics are joined on this socket, the most that may be", reason="overloaded")
        except FleetError as error:
            self.answer_error(request, error)
            return
        if elder is not None:
            self._end_channel(elder, frame.topic)
            self.out.send(phoenix.ended(elder.join_ref, elder.text, b"phx_close"))
        self.channels[frame.topic] = channel
        channel.open()

    def _channel(self, request: Request, frame: phoenix.Frame) -> AnyChannel:
        """What a join asks for.

        Raises:
            Invalid: not a topic of ours, an id that cannot be, or a payload that cannot be; names the field.
            Forbidden: the inbox of somebody else.
        """
        if frame.payload is None:
            raise malformed_payload()
        if frame.topic.startswith(_SESSION_TOPIC):
            session = SessionId(checked_id(frame.topic[len(_SESSION_TOPIC) :], "topic"))
            start = payloads.start_of_join(frame.payload)
            return Channel(self, session=session, topic=frame.topic, join=request, start=start)
        if frame.topic.startswith(_INBOX_TOPIC):
            if frame.topic[len(_INBOX_TOPIC) :] != self.principal.id:
                raise Forbidden("a participant may join its own inbox only", field="topic")
            return InboxChannel(self, join=request, limit=payloads.limit_of_inbox_join(frame.payload))
        raise Invalid("topics are session:<id> and inbox:<participant>", reason="unmatched topic", field="topic")

    # -- answers

    def answer_ok(self, request: Request, body: bytes) -> None:
        """Answer a request that was done; `body` is a JSON object."""
        self._answered(request, "ok", phoenix.reply_ok(request.join_ref, request.ref, request.topic, body))

    def answer_error(self, request: Request, error: FleetError) -> None:
        """Answer a request that was refused."""
        body = payloads.error_body(error)
        self._answered(request, error.code, phoenix.reply_error(request.join_ref, request.ref, request.topic, body))

    def _answered(self, request: Request, outcome: str, frame: bytes) -> None:
        self._outstanding -= 1
        self._outstanding_bytes -= request.size_bytes
        hub = self.hub
        hub.metrics.answered(request.event, outcome, hub.clock.monotonic_s() - request.started_s)
        if self._transport is None or self._closing is not None:
            return
        self.out.send(frame)
        if self._finishing and not self._outstanding:
            self.close(closing.DRAINING)

    def _refill(self) -> None:
        """There is room: replay whom it was refused, go on with what had arrived."""
        if self.out.full or self._transport is None or self._closing is not None:
            return
        self._heard_s = self.hub.clock.monotonic_s()
        self._arm(self.hub.config.heartbeat_timeout_ms / 1000)
        self._transport.resume_reading()
        self.out.feed_starved()
        self._pump(self._heard_s)

    # -- time

    def _arm(self, delay_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay_s, self._look)

    def _look(self) -> None:
        """Close who is silent or takes nothing; else look again when that could be."""
        now_s, config = self.hub.clock.monotonic_s(), self.hub.config
        if self.out.full:
            if self.out.stalled(now_s):
                self.close(closing.SLOW_READER)
            else:
                self._arm(self._stall_look_s())
            return
        left_s = self._heard_s + config.heartbeat_timeout_ms / 1000 - now_s
        if left_s <= 0:
            self.close(closing.HEARTBEAT_TIMEOUT)
        else:
            self._arm(left_s)

    def _stall_look_s(self) -> float:
        return min(self.hub.config.stall_ms, self.hub.config.lag_ms) / 4000

    # -- the end

    def announce_drain(self, retry_after_ms: int) -> None:
        """Tell each joined topic that this gateway is leaving."""
        for channel in self.channels.values():
            channel.announce_drain(retry_after_ms)

    def finish(self) -> None:
        """Close with `draining` as soon as nothing is under way; take nothing new."""
        self._finishing = True
        if not self._outstanding:
            self.close(closing.DRAINING)

    def close(self, reason: CloseReason, detail: str = "") -> None:
        """Say why and end; harmless when repeated."""
        if self._closing is not None or self._transport is None:
            return
        self._closing = reason
        self._end_channels()
        self.out.write(wsframes.close(reason.code, f"{reason.name}: {detail or reason.message}"))
        self.out.flush()
        # Read on: closing with unread bytes would reset the connection and take our close frame with it.
        self._transport.resume_reading()
        self._arm_end()

    def _on_close(self, payload: bytes) -> None:
        if self._closing is None:
            self._closing = closing.NORMAL
            self._end_channels()
            self.out.write(wsframes.control(wsframes.CLOSE, payload[:2]))
            self.out.flush()
        self._deaf = True
        self._end()

    def _end(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._arm_end()

    def _arm_end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(CLOSE_LINGER_S, self.abort)

    def abort(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def forget(self, channel: AnyChannel) -> None:
        """Drop a channel that ended by itself."""
        for topic, current in self.channels.items():
            if current is channel:
                del self.channels[topic]
                return

    def _end_channel(self, channel: AnyChannel, topic: str) -> None:
        self.out.spare(channel)
        del self.channels[topic]
        channel.close()

    def _end_channels(self) -> None:
        channels, self.channels = self.channels, {}
        for channel in channels.values():
            channel.close()
        for task in self._tasks:
            task.cancel()

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run `work` for as long as the socket lives."""
        task = self._loop.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._spawned_ended)
        return task

    def _spawned_ended(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        if not task.cancelled() and (fault := task.exception()) is not None:
            # A request would stay unanswered: the socket ends, the client comes back, the fault is in the log.
            self.hub.fault(fault)
            self.close(closing.INTERNAL)
