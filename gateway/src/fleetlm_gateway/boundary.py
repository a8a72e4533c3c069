"""The one door between the outer half of the gateway (WebSocket, REST) and the inner half (shards).

Promise: both doors to clients use exactly these operations. Each answers once: with a value or with a `FleetError`;
one deadline (`REQUEST_DEADLINE_S`) bounds each, retries included. A `TryAgain` leaves the outcome unknown: the same
keys make a retry safe. A `Subscription` is contiguous from where it started, or says a `Gap`; it never goes silent.
Must not be done here: parsing what clients send, making keys, limits of clients, authentication (the outer half),
how shards are reached (`router.py`, `shardlink.py`), how order is kept (`lanes.py`), how streams run (`streams.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fleetlm_common import rpc
from fleetlm_common.errors import FleetError
from fleetlm_common.ids import SessionId
from fleetlm_common.ops import Health

AppendDone = Callable[[list[rpc.Ack] | FleetError], None]
"""Called once with the acks (one a draft, in order) or with the refusal. Must not raise."""


@dataclass(frozen=True, slots=True)
class FromCursor:
    """Deliver what comes after `seq`."""

    seq: int


@dataclass(frozen=True, slots=True)
class FromTail:
    """Deliver the last `count` messages, then what comes."""

    count: int


@dataclass(frozen=True, slots=True)
class LiveOnly:
    """Deliver what comes after `last_seq` of the join's reply."""


Start = FromCursor | FromTail | LiveOnly
"""Where a subscription begins."""


class Sink(Protocol):
    """Where a subscription delivers to: one joined topic of one socket.

    All calls come from the loop, in the order in which the client must see them, none before `Subscription.begin` and
    none after `Subscription.close` (or after `closed`). None may raise or block.
    """

    def deliver(self, first_seq: int, count: int, body: bytes, /) -> bool:
        """Messages `first_seq` … `first_seq + count - 1` as JSON objects joined by commas.

        The same bytes object goes to every sink of the session. At most about `PAGE_BYTES_MAX` at once.

        Returns:
            True: taken. False: the sink is full and took *nothing* of it; it calls `Subscription.resume` when there is
            room again and then gets what follows its last taken message, so nothing is kept for it meanwhile.
        """
        ...

    def gap(self, gap: rpc.Gap, /) -> None:
        """Messages that this ring does not hold any more; delivery goes on at `gap.next_seq`."""
        ...

    def caught_up(self, seq: int, /) -> None:
        """Replay has met live; exactly once per subscription."""
        ...

    def read(self, participant: str, last_read_seq: int, /) -> None:
        """A participant's read cursor moved (a live hint: a sink that is full does not get it)."""
        ...

    def closed(self, reason: str, /) -> None:
        """The subscription is over and will not come back by itself.

        `cursor_ahead`: the ring does not hold what this reader has seen (joining again is refused with the facts);
        `draining`: this gateway stops. Nothing follows.
        """
        ...


class Subscription(Protocol):
    """One reader's place in a session."""

    @property
    def info(self) -> rpc.InfoOk:
        """The session when the subscription was made: for the join's reply."""
        ...

    def begin(self) -> None:
        """Start delivery: to be called once, after the join's reply was sent."""
        ...

    def resume(self) -> None:
        """There is room in the sink again (after it answered False); harmless at any other time."""
        ...

    def close(self) -> None:
        """End it; the sink is not called any more. Harmless when repeated."""
        ...


class Boundary:
    """What the outer half may ask."""

    @property
    def epoch(self) -> int:
        """The epoch of the newest ring map known; 0 before the first."""
        raise NotImplementedError

    def ready(self) -> Health:
        """Whether requests can be served, with the reason when not."""
        raise NotImplementedError

    async def start(self) -> None:
        """Begin to watch the ring map and to connect; returns at once, `ready` says when it is done."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Answer what waits with TRY_AGAIN `draining`, close subscriptions and connections."""
        raise NotImplementedError

    async def append(
        self, session: SessionId, drafts: list[rpc.Draft], *, expected_seq: int | None = None
    ) -> list[rpc.Ack]:
        """Append all drafts or none, in the order of the calls for one session.

        Cancelling the caller does not withdraw the append.

        Raises:
            FleetError: `TryAgain` (outcome unknown) or a `Rejected` (was not and will not be appended).
        """
        raise NotImplementedError

    def append_then(
        self, session: SessionId, drafts: list[rpc.Draft], *, expected_seq: int | None = None, done: AppendDone
    ) -> None:
        """`append` without a task: `done` is called once, maybe before this returns (a refusal at the door)."""
        raise NotImplementedError

    async def read(
        self,
        session: SessionId,
        *,
        after: int | None = None,
        before: int | None = None,
        tail: int | None = None,
        limit: int,
    ) -> rpc.Page:
        """One page; exactly one of `after`, `before` and `tail` is given.

        Raises:
            FleetError: `TryAgain`, or `Invalid` with reason `cursor_ahead` and `last_seq`.
        """
        raise NotImplementedError

    async def info(self, session: SessionId, *, cursor: int | None = None) -> rpc.InfoOk:
        """A session as it is; `exists` is False for one that was never written to.

        Raises:
            FleetError: `TryAgain`, or `Invalid` with reason `cursor_ahead` and `last_seq`.
        """
        raise NotImplementedError

    async def mark_read(self, session: SessionId, participant: str, seq: int) -> int:
        """Set a read cursor; returns where it is now (it never goes back).

        Raises:
            FleetError: `TryAgain`, or `Invalid` with reason `cursor_ahead` and `last_seq`.
        """
        raise NotImplementedError

    async def create(self, session: SessionId, metadata: bytes) -> rpc.Created:
        """Make a session; `metadata` is an encoded JSON object.

        Raises:
            FleetError: `TryAgain`, or `Conflict` when it exists with other metadata.
        """
        raise NotImplementedError

    async def sessions(self, *, after: str, limit: int) -> list[tuple[str, rpc.InfoOk]]:
        """Up to `limit` sessions of the whole ring after id `after` ("" from the first), by the bytes of their ids.

        Raises:
            TryAgain: a shard did not answer (a list with a hole would look like a whole one).
        """
        raise NotImplementedError

    async def subscribe(self, session: SessionId, *, start: Start, sink: Sink) -> Subscription:
        """Open a place in a session. Cancel-safe: nothing stays behind.

        Raises:
            FleetError: `TryAgain`, or `Invalid` with reason `cursor_ahead` and `last_seq`.
        """
        raise NotImplementedError
