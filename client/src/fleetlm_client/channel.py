"""One session over one connection after another: reader, outbox and calls on a `Topic`. Pure.

A reader that overflows in the middle of a replay makes it join again, for live messages only.

Promise: after each loss the session is joined again at what the reader holds, then unacknowledged appends are sent
again in order; each call and append ends. Must not be done here: sockets, refs (the `Link` owns them), when to join
(`topic.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec

from fleetlm_client.backoff import Backoff
from fleetlm_client.events import Draining, Joined, Reconnected
from fleetlm_client.frames import (
    SESSION_PREFIX,
    Frame,
    JoinPayload,
    Reply,
    decode_caught_up,
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
from fleetlm_client.topic import Sender, Topic, told_wait_s
from fleetlm_common.errors import FleetError, Invalid, Rejected, TryAgain, from_body


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


class Channel(Topic):
    """One session.

    Args:
        session_id: the session.
        cursor: where its reader is; None with `tail` None: live only.
        tail: begin with the last n messages.
        settings: bounds and times.
        backoff: makes waits.
        on_change: see `Topic`.
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
        super().__init__(SESSION_PREFIX + session_id, backoff=backoff(), on_change=on_change)
        self.joined: Joined | None = None
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
        self._page_backoff = backoff()
        self._calls: deque[Call] = deque()
        self._lost = False
        self._live_only = False
        self._replays = False
        self._caught_up = False
        self._paging = False
        self._page_not_before_s = 0.0

    # --- the link's calls

    def on_disconnected(self) -> None:
        """The connection is gone."""
        super().on_disconnected()
        self._lost = self.was_joined

    def _take_push(self, frame: Frame) -> None:
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
            case _:
                pass

    def _leaving(self, retry_after_ms: int) -> None:
        self.reader.tell_state(Draining(retry_after_ms))

    def pump(self, now_s: float, link: Sender) -> None:
        """Send whatever may be sent now, end what is past its deadline."""
        self.outbox.expire(now_s)
        self._expire_calls(now_s)
        super().pump(now_s, link)
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
        rejoin_at_s = super().next_at_s()
        if rejoin_at_s is not None:
            times.append(rejoin_at_s)
        if self.state == "joined":
            retry_s = self.outbox.retry_at_s()
            if retry_s is not None:
                times.append(retry_s)
            times += [call.not_before_s for call in self._calls if not call.in_flight]
            if not self._paging and self.reader.wants_page() is not None:
                times.append(self._page_not_before_s)
        return min(times) if times else None

    def _end(self, error: FleetError) -> None:
        self.outbox.fail_all(error)
        for call in self._calls:
            if not call.finished:
                call.finished = True
                call.done(error)
        self._calls.clear()

    # --- the owner's calls

    def append(self, append: Append) -> None:
        """Take an append.

        Raises:
            FleetError: the session has failed, or `TryAgain overloaded`: the outbox is full.
        """
        if self.error is not None:
            raise self.error.with_traceback(None)
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
            raise self.error.with_traceback(None)
        if len(self._calls) >= self._settings.calls_max:
            raise TryAgain(f"{len(self._calls)} calls wait for an answer", reason="overloaded")
        self._calls.append(call)

    # --- joining

    def _join_payload(self) -> bytes:
        self._caught_up = False
        reader = self.reader
        if self._live_only:
            payload = JoinPayload()
        elif reader.received_seq is not None:
            payload = JoinPayload(cursor=reader.received_seq)
        else:
            payload = JoinPayload(tail=self._tail)
        self._replays = payload.cursor is not None or payload.tail is not None
        return encode_json(payload)

    def _take_join(self, response: msgspec.Raw) -> None:
        joined = decode_joined(response)
        reader = self.reader
        if reader.received_seq is not None and joined.last_seq < reader.received_seq:
            raise Invalid(
                f"cursor {reader.received_seq} is beyond last_seq {joined.last_seq}: this ring does not hold what"
                " this client has seen",
                reason="cursor_ahead",
                field="cursor",
                last_seq=joined.last_seq,
            )
        self.joined = joined
        reader.on_joined(last_seq=joined.last_seq, replays=self._replays, tail=self._tail is not None)
        if self._lost:
            reader.tell_state(Reconnected(reader.cursor))
        self._lost = self._live_only = False
        self._caught_up = self._caught_up or not self._replays

    def _forget_flights(self) -> None:
        super()._forget_flights()
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
        self._page_not_before_s = now_s + self._page_backoff.next_s(told_wait_s(error))

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
                call.not_before_s = now_s + self._page_backoff.next_s(told_wait_s(error))
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
