"""What one session's reader gets, in order: pure.

Live pushes and replayed pages come in, events go out. `received_seq` is the last seq that went into the buffer,
`cursor` the last that the consumer took. A message goes in only as `received_seq + 1`; what is known already is
dropped; a hole, or a buffer that is full, makes the reader *behind*: pushes are dropped and pages are asked for
(`wants_page`) at the pace of the consumer until they meet what was pushed.

Promise: messages go out with contiguous seqs, or a `Gap` says exactly what is missing; memory is bounded whatever the
consumer does. Must not be done here: sending (`channel.py`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from fleetlm_client.events import CaughtUp, Draining, Event, Gap, Message, Page, Reconnected

_STATE_EVENTS = (CaughtUp, Draining, Reconnected)


@dataclass(slots=True)
class _Entry:
    event: Event
    size_bytes: int


class Reader:
    """Buffer between connection and consumer.

    Args:
        cursor: last seq that the consumer has processed; None: whatever the join says.
        messages_max: bound of buffered events.
        bytes_max: bound of buffered bytes (one frame may exceed it).
        page_messages: size of a page while behind.
    """

    def __init__(self, *, cursor: int | None, messages_max: int, bytes_max: int, page_messages: int) -> None:
        self.cursor = cursor
        self.received_seq = cursor
        self.seen_seq = 0
        self.behind = False
        self._told_caught_up = False
        self._entries: deque[_Entry] = deque()
        self._size_bytes = 0
        self._messages_max = messages_max
        self._bytes_max = bytes_max
        self._page_messages = page_messages

    def take(self) -> Event | None:
        """The next event, or None when there is none now; moves the cursor."""
        if not self._entries:
            return None
        entry = self._entries.popleft()
        self._size_bytes -= entry.size_bytes
        event = entry.event
        if isinstance(event, Message):
            self.cursor = event.seq
        elif isinstance(event, Gap):
            self.cursor = event.next_seq - 1
        elif isinstance(event, CaughtUp):
            self.cursor = event.seq if self.cursor is None else max(self.cursor, event.seq)
        return event

    @property
    def buffered(self) -> int:
        """Events that wait for the consumer."""
        return len(self._entries)

    def wants_page(self) -> int | None:
        """Seq after which a page should be asked for now; None: none is needed, or the consumer is slow."""
        if not self.behind or self.received_seq is None:
            return None
        room = (
            len(self._entries) <= self._messages_max - self._page_messages and self._size_bytes < self._bytes_max // 2
        )
        return self.received_seq if room else None

    def on_joined(self, *, last_seq: int, replays: bool, tail: bool) -> None:
        """A join was answered; `replays`: the server will push from the cursor (or the tail), then `caught_up`."""
        self._told_caught_up = False
        self.seen_seq = max(self.seen_seq, last_seq)
        if self.received_seq is None and not tail:
            self.received_seq = last_seq
            self.cursor = last_seq
        elif not replays and self.received_seq is not None and self.received_seq < last_seq:
            self.behind = True
        elif replays:
            self.behind = False

    def on_messages(self, messages: list[Message], *, size_bytes: int) -> None:
        """Messages were pushed."""
        if not messages:
            return
        self.seen_seq = max(self.seen_seq, messages[-1].seq)
        if self.received_seq is None:
            self.received_seq = messages[0].seq - 1
        if not self.behind:
            self._accept(messages, size_bytes // len(messages))

    def on_gap(self, gap: Gap) -> None:
        """The server says that messages are missing."""
        self.seen_seq = max(self.seen_seq, gap.next_seq - 1)
        if self.received_seq is None:
            self.received_seq = gap.from_seq - 1
        if self.behind or gap.next_seq <= self.received_seq + 1:
            return
        if gap.from_seq > self.received_seq + 1:
            self.behind = True
            return
        self._put_gap(gap, next_seq=gap.next_seq)

    def on_caught_up(self, seq: int) -> None:
        """The server says that replay has met live at `seq`."""
        self.seen_seq = max(self.seen_seq, seq)
        if self.received_seq is None:
            self.received_seq = seq
        if self.received_seq < seq:
            self.behind = True
        if not self.behind:
            self._tell_caught_up()

    def on_page(self, page: Page, *, size_bytes: int) -> bool:
        """A page that was asked for after `received_seq` arrived.

        Returns:
            False when it says that there is nothing although more was seen: only a new join can tell why.
        """
        assert self.received_seq is not None
        before = self.received_seq
        if page.gap is not None and page.gap.from_seq <= before + 1 < page.gap.next_seq:
            self._put_gap(page.gap, next_seq=page.gap.next_seq)
        if page.messages:
            first = page.messages[0].seq
            if first > self.received_seq + 1:
                found = Gap(
                    reason="missing", from_seq=before + 1, next_seq=first, earliest_seq=first, last_seq=self.seen_seq
                )
                self._put_gap(found, next_seq=first)
            self.behind = False
            self._accept(page.messages, size_bytes // len(page.messages))
            self.seen_seq = max(self.seen_seq, page.messages[-1].seq)
        self.behind = self.behind or page.has_more or self.received_seq < self.seen_seq
        if not self.behind:
            self._tell_caught_up()
        return self.received_seq > before or not self.behind

    def tell(self, event: Event) -> None:
        """Put an event that has no place in the log (presence, connection); dropped when the buffer is full."""
        if len(self._entries) < self._messages_max and not self.behind:
            self._entries.append(_Entry(event, 0))

    def tell_state(self, event: Event) -> None:
        """Put an event about the connection; of each kind only the newest after a message stays: so no bound."""
        entries = self._entries
        at = len(entries) - 1
        while at >= 0 and isinstance(entries[at].event, _STATE_EVENTS):
            if type(entries[at].event) is type(event):
                del entries[at]
                break
            at -= 1
        entries.append(_Entry(event, 0))

    def _accept(self, messages: list[Message], size_each_bytes: int) -> None:
        received = self.received_seq
        assert received is not None
        for message in messages:
            if message.seq <= received:
                continue
            full = len(self._entries) >= self._messages_max or self._size_bytes >= self._bytes_max
            if message.seq != received + 1 or full:
                self.behind = True
                break
            self._entries.append(_Entry(message, size_each_bytes))
            self._size_bytes += size_each_bytes
            received = message.seq
        self.received_seq = received

    def _put_gap(self, gap: Gap, *, next_seq: int) -> None:
        assert self.received_seq is not None
        told = Gap(
            reason=gap.reason,
            from_seq=self.received_seq + 1,
            next_seq=next_seq,
            earliest_seq=gap.earliest_seq,
            last_seq=gap.last_seq,
        )
        self._entries.append(_Entry(told, 0))
        self.received_seq = next_seq - 1

    def _tell_caught_up(self) -> None:
        """Once for each join, when everything seen was put."""
        if not self._told_caught_up:
            assert self.received_seq is not None
            self._told_caught_up = True
            self.tell_state(CaughtUp(self.received_seq))
