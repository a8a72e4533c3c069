"""One client's connection as a state machine, and the topics that share it: pure, no sockets, no clock of its own.

    down ──should_connect──▶ connecting ──▶ up ──lost, half open, draining──▶ down (after a random wait)
                                                └─ close code 4500–4999, 401, 403 ──▶ failed

The owner (`client.py`, or a simulator) performs what it says: connects when `should_connect`, writes `take_outgoing`,
closes when `wants_close`, and calls `received`, `disconnected` and, at `next_at_s`, `tick`.

Promise: every request is answered, or the connection is given up; a lost connection is made again with full jitter.
Must not be done here: I/O, and anything about the meaning of a topic's frames (`topic.py` and its kinds).
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass
from typing import Literal

import msgspec

from fleetlm_client.backoff import Backoff
from fleetlm_client.errors import ConnectionRefused, ProtocolMismatch
from fleetlm_client.frames import PHOENIX_TOPIC, Frame, decode_frame, decode_reply, encode_frame
from fleetlm_client.settings import Settings
from fleetlm_client.topic import ReplyTo, Topic
from fleetlm_common.errors import FleetError

State = Literal["down", "connecting", "up", "failed"]
CLOSE_FINAL_MIN = 4500
CLOSE_FINAL_MAX = 4999
LIVED_S = 1.0
"""A connection that held this long was a good one: the next is tried soon. So a client connects about once a second."""
UNREADABLE_MAX = 3
"""Connections in a row that ended with a frame that cannot be read: a fourth would bring it again."""


@dataclass(slots=True, eq=False)
class _Pending:
    topic: Topic
    reply_to: ReplyTo
    sent_s: float
    join_ref: str | None


class _CloseReason(msgspec.Struct, frozen=True):
    retry_after_ms: int = 0


class Link:
    """Connection state of one client.

    Args:
        settings: bounds and times.
        entropy: jitter.
    """

    def __init__(self, *, settings: Settings, entropy: random.Random) -> None:
        self.state: State = "down"
        self.error: FleetError | None = None
        self.wants_close = False
        self.connections = 0
        self._settings = settings
        self._entropy = entropy
        self._backoff = self.backoff()
        self._connect_at_s = 0.0
        self._connected_s = 0.0
        self._unreadable = 0
        self._drain_at_s: float | None = None
        self._heard_s = 0.0
        self._heartbeat_s = 0.0
        self._heartbeat_ref: str | None = None
        self._ref = 0
        self._now_s = 0.0
        self._outgoing: list[str] = []
        self._pending: dict[str, _Pending] = {}
        self._topics: dict[str, Topic] = {}
        self._timers: list[tuple[float, int, Topic]] = []
        self._wake_at_s: dict[str, float] = {}
        self._timer_count = 0

    def backoff(self) -> Backoff:
        """A new counter of failures with this client's settings."""
        settings = self._settings
        return Backoff(base_s=settings.backoff_base_s, cap_s=settings.backoff_cap_s, entropy=self._entropy)

    # --- topics

    def add(self, topic: Topic, now_s: float) -> None:
        """Take a topic; it is joined as soon as there is a connection.

        Raises:
            FleetError: the link has failed for good.
            ValueError: it is joined on this client already, or too many are.
        """
        if self.error is not None:
            raise self.error.with_traceback(None)
        if topic.name in self._topics:
            raise ValueError(f"{topic.name!r} is joined on this client already")
        if len(self._topics) >= self._settings.sessions_max:
            raise ValueError(f"{self._settings.sessions_max} topics are joined on this client (sessions_max)")
        self._topics[topic.name] = topic
        if self.state == "up":
            topic.on_connected()
        self.pump(topic, now_s)

    def remove(self, topic: Topic, now_s: float) -> None:
        """Leave a topic."""
        self._now_s = now_s
        if self._topics.get(topic.name) is topic:
            topic.leave(self)
            del self._topics[topic.name]
            self._wake_at_s.pop(topic.name, None)

    def pump(self, topic: Topic, now_s: float) -> None:
        """Let a topic send what it may; call it after giving it something to do."""
        self._now_s = now_s
        topic.pump(now_s, self)
        at_s = topic.next_at_s()
        name = topic.name
        if at_s is not None and at_s < self._wake_at_s.get(name, float("inf")) and name in self._topics:
            self._wake_at_s[name] = at_s
            self._timer_count += 1
            heapq.heappush(self._timers, (at_s, self._timer_count, topic))

    # --- what topics ask (`Sender`)

    def send(self, topic: Topic, event: str, payload: bytes, reply_to: ReplyTo) -> str:
        """Queue a frame; see `Sender`."""
        ref = self._next_ref()
        join_ref = ref if event == "phx_join" else topic.join_ref
        self._pending[ref] = _Pending(topic, reply_to, self._now_s, join_ref)
        self._outgoing.append(encode_frame(join_ref, ref, topic.name, event, payload))
        return ref

    def on_draining(self, retry_after_ms: int, now_s: float) -> None:
        """The gateway is leaving: be gone at a random moment within the time it gave."""
        if self._drain_at_s is None:
            self._drain_at_s = now_s + self._entropy.uniform(0, max(0, retry_after_ms) / 1000)

    def _next_ref(self) -> str:
        self._ref += 1
        return str(self._ref)

    # --- what the owner does and reports

    def should_connect(self, now_s: float) -> bool:
        """Whether to connect now; the state is then `connecting`."""
        if self.state != "down" or now_s < self._connect_at_s:
            return False
        self.state = "connecting"
        return True

    def connected(self, now_s: float) -> None:
        """The WebSocket stands."""
        self.state = "up"
        self.wants_close = False
        self.connections += 1
        self._connected_s = now_s
        self._heard_s = self._heartbeat_s = now_s
        for topic in list(self._topics.values()):
            topic.on_connected()
            self.pump(topic, now_s)

    def connect_failed(self, now_s: float, *, retry_after_s: float = 0.0) -> None:
        """No connection could be made."""
        self.state = "down"
        self._connect_at_s = now_s + self._backoff.next_s(retry_after_s)

    def disconnected(self, now_s: float, *, close_code: int | None = None, reason: str = "") -> None:
        """The WebSocket is gone, closed by either side."""
        planned = self._drain_at_s is not None and now_s >= self._drain_at_s
        self._now_s = now_s
        self._outgoing.clear()
        self._pending.clear()
        self._heartbeat_ref = self._drain_at_s = None
        self.wants_close = False
        if close_code is not None and CLOSE_FINAL_MIN <= close_code <= CLOSE_FINAL_MAX:
            self.fail(ConnectionRefused(f"closed with {close_code}: {reason}", close_code=close_code))
            return
        self.state = "down"
        lived_s = now_s - self._connected_s
        if lived_s >= LIVED_S:
            # Only connections that end at once make the waits grow.
            self._backoff.reset()
        if lived_s >= self._settings.backoff_cap_s:
            self._unreadable = 0
        self._connect_at_s = now_s if planned else now_s + self._backoff.next_s(_retry_after_s(reason))
        for topic in self._topics.values():
            topic.on_disconnected()

    def fail(self, error: FleetError) -> None:
        """Nothing more can be done: every topic is told; the first error counts."""
        if self.state == "failed":
            return
        self.state = "failed"
        self.error = error
        for topic in list(self._topics.values()):
            topic.fail(error)

    def received(self, text: str | bytes, now_s: float) -> None:
        """A text frame arrived."""
        self._now_s = self._heard_s = now_s
        try:
            self._dispatch(decode_frame(text), now_s)
        except msgspec.DecodeError as error:
            # What cannot be read may have been an answer: begin again on a connection where nothing is owed.
            if not self.wants_close:
                self._unreadable += 1
            self.wants_close = True
            if self._unreadable >= UNREADABLE_MAX:
                self.fail(ProtocolMismatch(str(error)))

    def _dispatch(self, frame: Frame, now_s: float) -> None:
        if frame.event == "phx_reply":
            self._on_reply(frame, now_s)
            return
        topic = self._topics.get(frame.topic)
        if topic is None or topic.join_ref is None or frame.join_ref not in {None, topic.join_ref}:
            return  # of a join that this client has given up
        topic.on_push(frame, now_s, self)
        self.pump(topic, now_s)

    def _on_reply(self, frame: Frame, now_s: float) -> None:
        if frame.ref == self._heartbeat_ref:
            self._heartbeat_ref = None
            return
        pending = self._pending.pop(frame.ref or "", None)
        if pending is None or not _is_current(pending):
            return
        pending.reply_to(decode_reply(frame.payload), now_s)
        self.pump(pending.topic, now_s)

    @property
    def has_outgoing(self) -> bool:
        """Whether there is something to write."""
        return bool(self._outgoing)

    def take_outgoing(self) -> list[str]:
        """Frames to write now, in order."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    # --- time

    def tick(self, now_s: float) -> None:
        """Do what is due."""
        self._now_s = now_s
        timers = self._timers
        while timers and timers[0][0] <= now_s:
            at_s, _, topic = heapq.heappop(timers)
            if self._wake_at_s.get(topic.name) == at_s and self._topics.get(topic.name) is topic:
                del self._wake_at_s[topic.name]
                self.pump(topic, now_s)
        if self.state == "up":
            self._tick_connection(now_s)

    def _tick_connection(self, now_s: float) -> None:
        settings = self._settings
        if self._drain_at_s is not None and now_s >= self._drain_at_s:
            self.wants_close = True
        silent_since_s = self._oldest_request_s()
        if silent_since_s is not None and now_s >= silent_since_s + settings.reply_timeout_s:
            self.wants_close = True
        if self._heartbeat_ref is not None:
            # Anything heard proves that the other side lives, also when its answer is late behind other frames.
            heard_s = max(self._heard_s, self._heartbeat_s)
            if now_s >= heard_s + settings.heartbeat_timeout_s:
                self.wants_close = True
        elif now_s >= self._heartbeat_s + settings.heartbeat_interval_s:
            self._heartbeat_ref = self._next_ref()
            self._heartbeat_s = now_s
            self._outgoing.append(encode_frame(None, self._heartbeat_ref, PHOENIX_TOPIC, "heartbeat"))

    def _oldest_request_s(self) -> float | None:
        """When the oldest request that still waits for its reply was sent."""
        while self._pending:
            ref = next(iter(self._pending))
            if _is_current(self._pending[ref]):
                return self._pending[ref].sent_s
            del self._pending[ref]
        return None

    def next_at_s(self) -> float | None:
        """When `tick` (or `should_connect`) should be called next."""
        times = [self._timers[0][0]] if self._timers else []
        if self.state == "down":
            times.append(self._connect_at_s)
        if self.state == "up" and not self.wants_close:
            settings = self._settings
            if self._heartbeat_ref is None:
                times.append(self._heartbeat_s + settings.heartbeat_interval_s)
            else:
                times.append(max(self._heard_s, self._heartbeat_s) + settings.heartbeat_timeout_s)
            if self._drain_at_s is not None:
                times.append(self._drain_at_s)
            silent_since_s = self._oldest_request_s()
            if silent_since_s is not None:
                times.append(silent_since_s + settings.reply_timeout_s)
        return min(times) if times else None


def _is_current(pending: _Pending) -> bool:
    """Whether the topic still waits for it: a rejoin on the same connection forgets what was sent before."""
    return pending.join_ref is not None and pending.join_ref == pending.topic.join_ref


def _retry_after_s(reason: str) -> float:
    """Close reasons may be JSON `{"retry_after_ms": n}`."""
    try:
        return max(0, msgspec.json.decode(reason, type=_CloseReason).retry_after_ms) / 1000
    except msgspec.DecodeError:
        return 0.0
