"""One reader's place in a session: where it stands, and what its sink has been told.

    NEW ── begin ──▶ CATCHING_UP ── met live ──▶ LIVE
                        ▲   │                     │
                     resume └─── sink full ──▶ STALLED ◀── sink full

Promise: a sink gets contiguous messages from its cursor, or a gap; `caught_up` exactly once, when everything that the
join's reply spoke of has been delivered and the reader follows the stream; nothing before `begin` or after `close`.
Must not be done here: getting messages (`streams.py`).
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from fleetlm_common import rpc
from fleetlm_gateway.tail import Chunk, cut

if TYPE_CHECKING:
    from fleetlm_gateway.sinks import Sink
    from fleetlm_gateway.streams import Stream


class State(Enum):
    """See the module's picture."""

    NEW = "new"
    CATCHING_UP = "catching_up"
    LIVE = "live"
    STALLED = "stalled"
    CLOSED = "closed"


BEHIND = (State.CATCHING_UP, State.STALLED)
"""States in which messages are owed that the stream does not deliver by itself."""


class Reader:
    """`Subscription` as the outer half knows it.

    Args:
        stream: the session's stream.
        sink: where messages go.
        info: the session at the join.
        cursor: the last seq that this reader does not want.
    """

    __slots__ = ("_goal_seq", "_sink", "_told_caught_up", "awaits_page", "cursor", "info", "state", "stream")

    def __init__(self, stream: Stream, sink: Sink, info: rpc.InfoOk, *, cursor: int) -> None:
        self.stream = stream
        self.info = info
        self.cursor = cursor
        self.state = State.NEW
        self.awaits_page = False
        self._sink = sink
        self._goal_seq = info.last_seq
        self._told_caught_up = False

    def begin(self) -> None:
        """Start delivery, once the join's reply was sent."""
        if self.state is State.NEW:
            self.to(State.CATCHING_UP)
            self.stream.advance(self)

    def resume(self) -> None:
        """The sink has room again."""
        if self.state is State.STALLED:
            self.to(State.CATCHING_UP)
            self.stream.advance(self)

    def close(self) -> None:
        """The client has left."""
        if self.state is not State.CLOSED:
            self.to(State.CLOSED)
            self.stream.leave(self)

    def end(self, reason: str) -> None:
        """The stream cannot go on for this reader: tell it."""
        if self.state is not State.CLOSED:
            self.close()
            self._sink.closed(reason)

    def to(self, state: State) -> None:
        """Change the state; the stream keeps count."""
        before, self.state = self.state, state
        self.stream.changed(self, before)

    def take(self, chunk: Chunk) -> bool:
        """Deliver what comes after the cursor.

        Returns:
            Whether the reader may get more (its sink was not full and did not leave meanwhile).
        """
        state = self.state
        if chunk.first_seq != self.cursor + 1:
            if chunk.last_seq <= self.cursor:
                return True
            assert chunk.first_seq <= self.cursor, "the stream skipped something"
            chunk = cut(chunk, self.cursor)
        if not self._sink.deliver(chunk.first_seq, chunk.count, chunk.body):
            if self.state is state:
                self.to(State.STALLED)
            return False
        self.cursor = chunk.last_seq
        if not self._told_caught_up:
            self.met_live()
        return self.state is state

    def skip(self, gap: rpc.Gap) -> None:
        """Tell that messages are missing and go on behind them."""
        self._sink.gap(gap)
        self.cursor = max(self.cursor, gap.next_seq - 1)

    def met_live(self) -> None:
        """Say `caught_up` if that is true now and was not said."""
        if self.state is State.LIVE and not self._told_caught_up and self.cursor >= self._goal_seq:
            self._told_caught_up = True
            self._sink.caught_up(self.cursor)

    def hint(self, push: rpc.PushRead) -> None:
        """Pass on that a read cursor moved, to a sink that has room."""
        if self.state in (State.LIVE, State.CATCHING_UP):
            self._sink.read(push.participant, push.last_read_seq)
