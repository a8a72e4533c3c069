"""One session over one connection after another: join state, reader, outbox and calls. Pure.

    away ──connected──▶ joining ──ok──▶ joined
      ▲                   │ TRY_AGAIN       │ phx_error, phx_close, overflow of a replay
      └────disconnected───┴──▶ waiting ◀────┘        any ──refused for good──▶ failed

Promise: after each loss the session is joined again at what the reader holds, then unacknowledged appends are sent
again in order; each call and append ends. Must not be done here: sockets, refs (the `Link` owns them).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import msgspec

from fleetlm_client.backoff import Backoff
from fleetlm_client.events import Draining, Joined, Reconnected
from fleetlm_client.frames import (
    EMPTY,
    TOPIC_PREFIX,
    Frame,
    JoinPayload,
    Reply,
    decode_caught_up,
    decode_draining,
    decode_error,
    decode_gap,
    decode_joined,
    decode_messages,
    decode_page,
    decode_read,
    encode_json,
)
from fleetlm_client.outbox import Append, Outbox
from fleetlm_client.reader import Reader
from fleetlm_client.settings import Settings
from fleetlm_common.errors import FleetError, Invalid, Rejected, TryAgain, from_body

State = Literal["away", "joining", "joined", "waiting", "failed", "left"]
ReplyTo = Callable[[Reply, float], None]
"""Takes a reply and the time (monotonic seconds)."""


class Sender(Protocol):
    """What a channel needs of its link."""

    def send(self, channel: Channel, event: str, payload: bytes, reply_to: ReplyTo) -> str:
        """Queue a frame of that channel; its reply goes to `reply_to`. Returns the ref."""
        ...

    def on_draining(self, retry_after_ms: int, now_s: float) -> None:
        """The gateway says that it is leaving."""
        ...


@dataclass(slots=True, eq=False, kw_only=True)
class Call:
    """A request that may be sent twice without harm (`replay`, `mark_read`)."""

    event: str
    payload: bytes
    deadline_s: float
    done: Callable[[msgspec.Raw | FleetError], None]
    in_flight: bool = False
    finished: bool = False
    not_before_s: float = 0.0
    last_error: FleetError | None = None


class Channel:
    """One session.

    Args:
        session_id: the session.
        cursor: where its reader is; None with `tail` None: live only.
        tail: begin with the last n messages.
        settings: bounds and times.
        backoff: makes waits.
        on_change: called when the reader may have events, the join was answered, or there is room again.
    """

    def __init__(
        self,
        session_id: str,
        *,
        cursor: int | None,
        tail: int | None,
        settings: Settings,
        backoff: Callable[[], Backoff],
        on_change: Callable[[], None],
    ) -> None:
        self.session_id = session_id
        self.topic = TOPIC_PREFIX + session_id
        self.state: State = "away"
        self.join_ref: str | None = None
        self.joined: Joined | None = None
        self.error: FleetError | None = None
        self.reader = Reader(
            cursor=cursor,
            messages_max=settings.buffer_messages_max,
            bytes_max=settings.buffer_bytes_max,
            page_messages=settings.page_messages,
        )
        self.outbox = Outbox(
            messages_max=settings.outbox_messages_max, bytes_max=settings.outbox_bytes_max, backoff=backoff()
        )
        self._tail = tail
        self._settings = settings
        self._backoff = backoff()
        self._page_backoff = backoff()
        self._on_change = on_change
        self._calls: deque[Call] = deque()
        self._rejoin_at_s = 0.0
        self._lost = False
        self._live_only = False
        self._caught_up = False
        self._paging = False
        self._page_not_before_s = 0.0

    # --- the link's calls

    def on_connected(self) -> None:
        """A new connection stands."""
        if self.state in {"away", "waiting", "joining", "joined"}:
            self.state = "waiting"
            self._rejoin_at_s = 0.0

    def on_disconnected(self) -> None:
        """The connection is gone."""
        if self.state not in {"failed", "left"}:
            self._forget_flights()
            self._lost = self.joined is not None
            self.state = "away"

    def on_push(self, frame: Frame, now_s: float, link: Sender) -> None:
        """A frame that is no reply."""
        reader = self.reader
        payload = frame.payload
        match frame.event:
            case "messages":
                reader.on_messages(decode_messages(payload).messages, size_bytes=len(memoryview(payload)))
            case "caught_up":
                self._caught_up = True
                reader.on_caught_up(decode_caught_up(payload).seq)
            case "gap":
                reader.on_gap(decode_gap(payload))
            case "read":
                reader.tell(decode_read(payload))
            case "draining":
                retry_after_ms = decode_draining(payload).retry_after_ms
                reader.tell_state(Draining(retry_after_ms))
                link.on_draining(retry_after_ms, now_s)
            case "phx_error" | "phx_close" if self.state in {"joined", "joining"}:
                self._rejoin_later(now_s, at_least_s=0.0)
            case _:
                return  # events of a newer server are not ours to judge
        self._on_change()

    def pump(self, now_s: float, link: Sender) -> None:
        """Send whatever may be sent now, end what is past its deadline."""
        self.outbox.expire(now_s)
        self._expire_calls(now_s)
        if self.state == "waiting" and now_s >= self._rejoin_at_s:
            self._join(link)
        if self.state != "joined":
            return
        if self.reader.behind and not self._caught_up and not self._live_only:
            # The buffer overflowed in the middle of the server's replay: have it stop pushing what would be dropped.
            self._live_only = True
            self._forget_flights()
            self._join(link)
            return
        payload = self.outbox.next_payload(now_s)
        if payload is not None:
            link.send(self, "append", payload, self._append_answered)
        for call in self._calls:
            if not call.in_flight and now_s >= call.not_before_s:
                call.in_flight = True
                link.send(self, call.event, call.payload, partial(self._call_answered, call))
        self._ask_page(now_s, link)

    def next_at_s(self) -> float | None:
        """When `pump` should be called next, whatever arrives until then."""
        times = [call.deadline_s for call in self._calls]
        deadline_s = self.outbox.deadline_at_s()
        if deadline_s is not None:
            times.append(deadline_s)
        if self.state == "waiting":
            times.append(self._rejoin_at_s)
        if self.state == "joined":
            retry_s = self.outbox.retry_at_s()
            if retry_s is not None:
                times.append(retry_s)
            times += [call.not_before_s for call in self._calls if not call.in_flight]
            if not self._paging and self.reader.wants_page() is not None:
                times.append(self._page_not_before_s)
        return min(times) if times else None

    def fail(self, error: FleetError) -> None:
        """The session cannot go on: every waiter is told why."""
        if self.state in {"failed", "left"}:
            return
        self.state = "failed"
        self.error = error
        self.outbox.fail_all(error)
        for call in self._calls:
            if not call.finished:
                call.finished = True
                call.done(error)
        self._calls.clear()
        self._on_change()

    # --- the owner's calls

    def append(self, append: Append) -> None:
        """Take an append.

        Raises:
            FleetError: the session has failed, or `TryAgain overloaded`: the outbox is full.
        """
        if self.error is not None:
            raise self.error
        self.outbox.submit(append)

    def _append_answered(self, reply: Reply, now_s: float) -> None:
        if reply.status == "ok":
            self.outbox.on_ok(reply.response)
        else:
            self.outbox.on_error(from_body(decode_error(reply.response)), now_s)
        self._on_change()

    def call(self, call: Call) -> None:
        """Take a call.

        Raises:
            FleetError: the session has failed, or `TryAgain overloaded`: too many calls wait.
        """
        if self.error is not None:
            raise self.error
        if len(self._calls) >= self._settings.calls_max:
            raise TryAgain(f"{len(self._calls)} calls wait for an answer", reason="overloaded")
        self._calls.append(call)

    # --- joining

    def _join(self, link: Sender) -> None:
        self.state = "joining"
        self._caught_up = False
        reader = self.reader
        if self._live_only:
            payload = JoinPayload()
        elif reader.received_seq is not None:
            payload = JoinPayload(cursor=reader.received_seq)
        else:
            payload = JoinPayload(tail=self._tail)
        replays = payload.cursor is not None or payload.tail is not None
        self.join_ref = link.send(self, "phx_join", encode_json(payload), partial(self._join_answered, replays))

    def _join_answered(self, replays: bool, reply: Reply, now_s: float) -> None:
        if reply.status == "ok":
            self._join_ok(decode_joined(reply.response), replays=replays)
            return
        error = from_body(decode_error(reply.response))
        if isinstance(error, Rejected):
            self.fail(error)
            return
        self._rejoin_later(now_s, at_least_s=_told_wait_s(error))

    def _join_ok(self, joined: Joined, *, replays: bool) -> None:
        reader = self.reader
        if reader.received_seq is not None and joined.last_seq < reader.received_seq:
            self.fail(
                Invalid(
                    f"cursor {reader.received_seq} is beyond last_seq {joined.last_seq}: this ring does not hold what"
                    " this client has seen",
                    reason="cursor_ahead",
                    field="cursor",
                    last_seq=joined.last_seq,
                )
            )
            return
        self.state = "joined"
        self.joined = joined
        self._backoff.reset()
        reader.on_joined(last_seq=joined.last_seq, replays=replays, tail=self._tail is not None)
        if self._lost:
            reader.tell_state(Reconnected(reader.cursor))
        self._lost = self._live_only = False
        self._caught_up = self._caught_up or not replays
        self._on_change()

    def _rejoin_later(self, now_s: float, *, at_least_s: float) -> None:
        self._forget_flights()
        self.state = "waiting"
        self._rejoin_at_s = now_s + self._backoff.next_s(at_least_s)

    def _forget_flights(self) -> None:
        """Replies to what was sent may never come: it will be sent again."""
        self.join_ref = None
        self.outbox.on_lost()
        self._paging = False
        for call in self._calls:
            call.in_flight = False

    # --- pages for a reader that is behind

    def _ask_page(self, now_s: float, link: Sender) -> None:
        after = self.reader.wants_page()
        if after is None or self._paging or now_s < self._page_not_before_s:
            return
        self._paging = True
        payload = encode_json({"after": after, "limit": self._settings.page_messages})
        link.send(self, "replay", payload, self._page_answered)

    def _page_answered(self, reply: Reply, now_s: float) -> None:
        """A page that this channel asked for itself arrived, or not."""
        self._paging = False
        if reply.status == "ok":
            response = reply.response
            if self.reader.on_page(decode_page(response), size_bytes=len(memoryview(response))):
                self._page_backoff.reset()
                self._on_change()
            else:
                self._rejoin_later(now_s, at_least_s=0.0)
            return
        error = from_body(decode_error(reply.response))
        if isinstance(error, Rejected):
            self.fail(error)
            return
        self._page_not_before_s = now_s + self._page_backoff.next_s(_told_wait_s(error))

    # --- calls

    def _call_answered(self, call: Call, reply: Reply, now_s: float) -> None:
        """A call's reply arrived."""
        call.in_flight = False
        if call.finished:
            return
        if reply.status != "ok":
            error = from_body(decode_error(reply.response))
            if not isinstance(error, Rejected):
                call.last_error = error
                call.not_before_s = now_s + self._page_backoff.next_s(_told_wait_s(error))
                return
            self._end_call(call, error)
            return
        self._end_call(call, reply.response)

    def _expire_calls(self, now_s: float) -> None:
        for call in [call for call in self._calls if call.deadline_s <= now_s]:
            self._end_call(
                call, call.last_error or TryAgain(f"{call.event} was not answered in time", reason="unavailable")
            )

    def cancel_call(self, call: Call) -> None:
        """The caller does not wait any more."""
        call.finished = True
        if call in self._calls:
            self._calls.remove(call)

    def _end_call(self, call: Call, result: msgspec.Raw | FleetError) -> None:
        call.finished = True
        if call in self._calls:
            self._calls.remove(call)
        call.done(result)

    def leave(self, link: Sender) -> None:
        """Say goodbye; unacknowledged appends end in `OutcomeUnknown` or `NotSent`."""
        if self.state == "joined":
            link.send(self, "phx_leave", EMPTY, _ignore_reply)
        if self.state != "failed":
            self.outbox.fail_all(TryAgain("the session was left", reason="unavailable"))
        self.state = "left"


def _ignore_reply(reply: Reply, now_s: float) -> None:
    """Nobody waits for it."""


def _told_wait_s(error: FleetError) -> float:
    """How long the server asked to wait."""
    return error.retry_after_ms / 1000 if isinstance(error, TryAgain) else 0.0
