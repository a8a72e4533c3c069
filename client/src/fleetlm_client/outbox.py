"""Unacknowledged appends of one session: pure, no sockets, no clock of its own.

The rule of order: **one append frame in flight at a time**. What is submitted meanwhile waits, and goes out together
in the next frame. A frame's messages, once sent, stay together and are sent again as they are (same keys) until the
server answers; only then does the next frame leave. So neither a lost connection nor a TRY_AGAIN can let a later
append overtake an earlier one.

A frame is all or nothing at the server. When it refuses one that was put together from several calls, nothing of it
was appended, so the calls are sent again one by one: only the one at fault is refused. A call with `expected_seq` or
with several messages always has a frame of its own.

Promise: each call's `done` is called exactly once: with acks, with what the server refused, or at its deadline with
`OutcomeUnknown` (it was sent) or `NotSent`. An append whose outcome is unknown may still land later, also behind
appends that were acknowledged meanwhile.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from fleetlm_client.backoff import Backoff
from fleetlm_client.drafts import PAYLOAD_BYTES_MAX, Fragment
from fleetlm_client.errors import NotSent, OutcomeUnknown
from fleetlm_client.events import Ack
from fleetlm_client.frames import decode_ack, decode_acks
from fleetlm_common.errors import FleetError, Rejected, TryAgain
from fleetlm_common.limits import BATCH_MESSAGES_MAX

Done = Callable[[list[Ack] | FleetError], None]


@dataclass(slots=True, eq=False, kw_only=True)
class Append:
    """One call: its messages, and where its answer goes."""

    fragments: tuple[Fragment, ...]
    deadline_s: float
    done: Done
    expected_seq: int | None = None
    batch: bool = False
    alone: bool = False
    sent: bool = False
    finished: bool = False
    last_error: FleetError | None = None
    size_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        """Know the size."""
        self.size_bytes = sum(len(one.body) + 1 for one in self.fragments)
        self.alone = self.alone or self.batch or self.expected_seq is not None

    @property
    def keys(self) -> tuple[str, ...]:
        """Idempotency keys of its messages."""
        return tuple(one.key for one in self.fragments)


class Outbox:
    """Queue and one frame in flight.

    Args:
        messages_max: bound in messages.
        bytes_max: bound in bytes of JSON.
        backoff: waits after TRY_AGAIN.
    """

    def __init__(self, *, messages_max: int, bytes_max: int, backoff: Backoff) -> None:
        self._messages_max = messages_max
        self._bytes_max = bytes_max
        self._backoff = backoff
        self._queue: deque[Append] = deque()
        self._group: list[Append] = []
        self._flying = False
        self._not_before_s = 0.0
        self._deadlines: list[tuple[float, int, Append]] = []
        self._submitted = 0
        self.messages = 0
        self.size_bytes = 0

    def has_room(self, messages: int, size_bytes: int) -> bool:
        """Whether a call of that size may be submitted now; an empty outbox takes any."""
        if self.messages == 0:
            return True
        return self.messages + messages <= self._messages_max and self.size_bytes + size_bytes <= self._bytes_max

    def submit(self, append: Append) -> None:
        """Take a call.

        Raises:
            TryAgain: `overloaded`: the outbox is full; wait for room.
        """
        if not self.has_room(len(append.fragments), append.size_bytes):
            raise TryAgain(f"outbox is full ({self.messages} messages unacknowledged)", reason="overloaded")
        self.messages += len(append.fragments)
        self.size_bytes += append.size_bytes
        self._submitted += 1
        self._queue.append(append)
        heapq.heappush(self._deadlines, (append.deadline_s, self._submitted, append))

    def next_payload(self, now_s: float) -> bytes | None:
        """The frame to send now, if there is one; it counts as sent."""
        if self._flying or now_s < self._not_before_s:
            return None
        if not self._group:
            self._group = self._gather()
            if not self._group:
                return None
        self._flying = True
        for append in self._group:
            append.sent = True
        return _payload(self._group)

    def _gather(self) -> list[Append]:
        """Take the calls of the next frame from the queue."""
        group: list[Append] = []
        messages = size_bytes = 0
        queue = self._queue
        while queue:
            append = queue[0]
            if append.finished:
                queue.popleft()
                continue
            messages += len(append.fragments)
            size_bytes += append.size_bytes
            full = messages > BATCH_MESSAGES_MAX or size_bytes > PAYLOAD_BYTES_MAX
            if group and (full or append.alone):
                break
            group.append(queue.popleft())
            if append.alone:
                break
        return group

    def on_ok(self, response: bytes | msgspec.Raw) -> None:
        """The frame in flight was acknowledged.

        Raises:
            msgspec.ValidationError: the answer is not one to this frame; the connection is not to be trusted.
        """
        if not self._flying:
            return
        group = self._group
        acks = decode_acks(response).messages if _is_many(group) else [decode_ack(response)]
        if len(acks) != sum(len(append.fragments) for append in group):
            raise msgspec.ValidationError(f"{len(acks)} acknowledgements for another number of messages")
        self._release()
        self._backoff.reset()
        at = 0
        for append in group:
            count = len(append.fragments)
            self._finish(append, acks[at : at + count])
            at += count

    def on_error(self, error: FleetError, now_s: float) -> None:
        """The frame in flight was refused, for now or for good."""
        if not self._flying:
            return
        group = self._group
        if not isinstance(error, Rejected):
            retry_after_s = error.retry_after_ms / 1000 if isinstance(error, TryAgain) else 0.0
            self._flying = False
            self._not_before_s = now_s + self._backoff.next_s(retry_after_s)
            for append in group:
                append.last_error = error
            self._drop_finished_group()
            return
        self._release()
        self._backoff.reset()
        if len(group) == 1:
            self._finish(group[0], error)
            return
        # Nothing of the frame was appended: find out whose fault it is by asking for each call alone, in order.
        for append in reversed(group):
            append.alone = True
            append.sent = False
            self._queue.appendleft(append)

    def on_lost(self) -> None:
        """The connection is gone: whatever was in flight will be sent again as it is."""
        self._flying = False
        self._not_before_s = 0.0
        self._drop_finished_group()

    def expire(self, now_s: float) -> None:
        """End calls whose deadline has passed."""
        deadlines = self._deadlines
        while deadlines and (deadlines[0][2].finished or deadlines[0][0] <= now_s):
            append = heapq.heappop(deadlines)[2]
            self._abandon(append, "its deadline passed first")
        if not self._flying:
            self._drop_finished_group()

    def cancel(self, append: Append) -> None:
        """The caller does not wait any more: not sent yet means it never will be."""
        if not append.finished:
            self._count_out(append)

    def fail_all(self, error: FleetError) -> None:
        """Nothing can be sent any more."""
        for append in [*self._group, *self._queue]:
            append.last_error = error
            self._abandon(append, error.message)
        self._group.clear()
        self._queue.clear()
        self._deadlines.clear()
        self._flying = False

    def deadline_at_s(self) -> float | None:
        """When `expire` should be called next."""
        deadlines = self._deadlines
        while deadlines and deadlines[0][2].finished:
            heapq.heappop(deadlines)
        return deadlines[0][0] if deadlines else None

    def retry_at_s(self) -> float | None:
        """When the frame that was refused for now should be sent again."""
        return self._not_before_s if self._group and not self._flying else None

    def _abandon(self, append: Append, why: str) -> None:
        if append.finished:
            return
        if append.sent:
            self._finish(append, OutcomeUnknown(keys=append.keys, last_error=append.last_error))
        else:
            self._finish(append, NotSent(keys=append.keys, why=why))

    def _finish(self, append: Append, result: list[Ack] | FleetError) -> None:
        if not append.finished:
            self._count_out(append)
            append.done(result)

    def _count_out(self, append: Append) -> None:
        append.finished = True
        self.messages -= len(append.fragments)
        self.size_bytes -= append.size_bytes

    def _release(self) -> None:
        self._group = []
        self._flying = False
        self._not_before_s = 0.0

    def _drop_finished_group(self) -> None:
        """Nobody waits for any call of the frame: do not send it again."""
        if self._group and all(append.finished for append in self._group):
            self._release()


def _is_many(group: list[Append]) -> bool:
    return len(group) > 1 or group[0].batch


def _payload(group: list[Append]) -> bytes:
    """JSON of an append frame."""
    first = group[0]
    bodies = [one.body for append in group for one in append.fragments]
    expected = b"" if first.expected_seq is None else b',"expected_seq":%d' % first.expected_seq
    if _is_many(group):
        return b'{"messages":[' + b",".join(bodies) + b"]" + expected + b"}"
    return bodies[0][:-1] + expected + b"}"
