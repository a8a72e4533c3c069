"""What can be asked of a shard, what its answers mean, and how long to wait before asking again.

Promise: whatever a shard or a lost connection says becomes a value, a `Rejected`, a `TryAgain` or a `Moved`; the
outcome of a `TryAgain` is unknown. Pure: no sockets, no clocks.
Must not be done here: choosing a shard (`router.py`), sending (`shardlink.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import msgspec

from fleetlm_common import rpc
from fleetlm_common.errors import FleetError, Moved, TryAgain
from fleetlm_common.rpc import Kind
from fleetlm_gateway.shardlink import LOST, NoPath, error_of

BACKOFF_MIN_S: Final = 0.01
BACKOFF_MAX_S: Final = 0.5
"""Retries while a shard refuses: a planned move lasts less than a second, so waiting longer would lengthen it."""
MOVED_AT_ONCE_MAX: Final = 3
"""MOVEDs in a row that are followed without waiting; more of them are a map that runs in circles."""

R = TypeVar("R")

_decode_moved = msgspec.msgpack.Decoder(rpc.MovedBody).decode


@dataclass(frozen=True, slots=True)
class Exchange(Generic[R]):
    """A kind of request, the kind of its reply and how that is read."""

    kind: Kind
    reply: Kind
    decode: Callable[[bytes], R]


READ: Final = Exchange(Kind.READ, Kind.PAGE, msgspec.msgpack.Decoder(rpc.Page).decode)
INFO: Final = Exchange(Kind.INFO, Kind.INFO_OK, msgspec.msgpack.Decoder(rpc.InfoOk).decode)
MARK_READ: Final = Exchange(Kind.MARK_READ, Kind.MARKED, msgspec.msgpack.Decoder(rpc.Marked).decode)
CREATE: Final = Exchange(Kind.CREATE, Kind.CREATED, msgspec.msgpack.Decoder(rpc.Created).decode)
PARTICIPATED: Final = Exchange(
    Kind.PARTICIPATED, Kind.PARTICIPATED_OK, msgspec.msgpack.Decoder(rpc.ParticipatedOk).decode
)
INBOX: Final = Exchange(Kind.INBOX, Kind.INBOX_PAGE, msgspec.msgpack.Decoder(rpc.InboxPage).decode)
CHANGES: Final = Exchange(Kind.CHANGES, Kind.CHANGED, msgspec.msgpack.Decoder(rpc.Changed).decode)
ENTRIES: Final = Exchange(Kind.ENTRIES, Kind.ENTRIES_OK, msgspec.msgpack.Decoder(rpc.EntriesOk).decode)
LIST: Final = Exchange(Kind.LIST, Kind.LISTED, msgspec.msgpack.Decoder(rpc.Listed).decode)


def refusal_of(kind: int, payload: bytes) -> FleetError:
    """What a frame that is not the hoped-for reply means: `TryAgain`, `Rejected` or `Moved`."""
    if kind == LOST:
        return NoPath("the connection to the shard was lost")
    if kind == Kind.ERROR:
        return error_of(payload)
    if kind == Kind.MOVED:
        body = _decode_moved(payload)
        return Moved(owner=body.owner, epoch=body.epoch)
    return TryAgain(f"the shard answered with a frame of kind {kind}", reason="unavailable")


class Retry:
    """How often one thing was tried, why it failed last, and how long to wait before the next try.

    Full jitter over half of an exponential ceiling, so that those who failed together do not come back together.
    """

    __slots__ = ("_entropy", "_failures", "_moves", "refusal")

    def __init__(self, entropy: random.Random) -> None:
        self._entropy = entropy
        self._failures = 0
        self._moves = 0
        self.refusal: TryAgain | None = None

    def reset(self) -> None:
        """It worked."""
        self._failures = self._moves = 0
        self.refusal = None

    def failed(self, error: TryAgain | Moved, *, news: bool = False) -> float:
        """Count a failure.

        Args:
            error: why.
            news: a MOVED told something that was not known: the next try may be right at once.

        Returns:
            Seconds to wait.
        """
        if isinstance(error, Moved):
            if news and self._moves < MOVED_AT_ONCE_MAX:
                self._moves += 1
                return 0.0
            self.refusal = TryAgain("its owner changes", reason="moving")
            least_s = 0.0
        else:
            self.refusal = error
            # A shard that says when a retry makes sense is believed, within our own ceiling.
            least_s = 0.0 if isinstance(error, NoPath) else error.retry_after_ms / 1000
        self._failures += 1
        ceiling_s = min(BACKOFF_MAX_S, max(least_s, BACKOFF_MIN_S * 2 ** min(self._failures, 10)))
        return self._entropy.uniform(ceiling_s / 2, ceiling_s)

    def gave_up(self) -> TryAgain:
        """The answer when the deadline has passed: the outcome is unknown, the last reason is told."""
        last = self.refusal
        if last is None:
            return TryAgain("no answer within the deadline; the outcome is unknown", reason="unavailable")
        text = f"no success within the deadline, the outcome is unknown; last: {last.message}"
        again = TryAgain(text, reason="unavailable", retry_after_ms=last.retry_after_ms)
        again.reason = last.reason
        return again
