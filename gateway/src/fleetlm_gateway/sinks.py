"""Where a subscription begins, where it delivers to, and what its reader may do with it.

Promise: `boundary.py` offers these names to the outer half; the inner half implements `Subscription` (`readers.py`).
Must not be done here: anything but names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fleetlm_common import rpc


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
