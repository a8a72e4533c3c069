"""What a controller remembers from look to look: times, which no look can show. Pure.

Promise: nothing here is needed to be right: a controller that begins without it makes the same moves, it only waits
anew (for a seal to be confirmed, after a failure, for a shard to join, for a word of one that is to be forgotten). Must
not be done here: reading clocks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Final

import msgspec

from fleetlm_common.control import ShardEndpoint
from fleetlm_common.ids import ShardName
from fleetlm_common.ring import Move

BACKOFF_FIRST_S: Final = 1.0
BACKOFF_MAX_S: Final = 60.0
"""Before a move that failed is tried again, doubled with each failure: what failed it (a full disk, a node that is
away) seldom mends itself at once, and each try costs a copy."""
LOOKS_APART_S_MAX: Final = 10.0
"""Controllers look every three to five seconds while something is under way; after a longer gap a silence is measured
anew."""

_NOTHING: Final[Mapping[Any, Any]] = MappingProxyType({})
Pair = tuple[ShardName, ShardName]
"""Source and target."""


class Watched(msgspec.Struct, frozen=True):
    """A move in flight: since when it is in its state, and since when what its target says of it has not changed."""

    state: str
    since_s: float
    said: tuple[str, int, int]
    said_since_s: float


class Silence(msgspec.Struct, frozen=True):
    """A member that people want forgotten: its last word (None: none from its volume), and how long that is the last.

    It counts from `since_s`, as far as somebody looked all the time, last at `looked_s`.
    """

    said: ShardEndpoint | None
    since_s: float
    looked_s: float


class Failure(msgspec.Struct, frozen=True):
    """A pair whose last moves failed, the first of them at `since_s`: not again before `until_s`."""

    count: int
    since_s: float
    until_s: float
    why: str


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Everything; the default is that of a controller that has just begun."""

    moves: Mapping[str, Watched] = _NOTHING
    failures: Mapping[Pair, Failure] = _NOTHING
    awaited_since_s: Mapping[ShardName, float] = _NOTHING
    """Shards that are asked for and are no members yet."""
    silences: Mapping[ShardName, Silence] = _NOTHING
    """Of members that people want forgotten, and that nothing else keeps."""

    def awaiting(self, names: list[ShardName], now_s: float) -> Memory:
        """Remember who is awaited now."""
        since = {name: self.awaited_since_s.get(name, now_s) for name in names}
        return msgspec.structs.replace(self, awaited_since_s=since)

    def listening(self, said: Mapping[ShardName, ShardEndpoint | None], now_s: float) -> Memory:
        """Remember what the members that may be forgotten said last; the others are not listened to any more."""
        return msgspec.structs.replace(
            self, silences={name: self._silence(name, words, now_s) for name, words in said.items()}
        )

    def _silence(self, name: ShardName, said: ShardEndpoint | None, now_s: float) -> Silence:
        known = self.silences.get(name)
        # While nobody could look the shard could not be heard either: the control plane was away for all.
        if known is None or known.said != said or now_s - known.looked_s > LOOKS_APART_S_MAX:
            return Silence(said, now_s, now_s)
        return msgspec.structs.replace(known, looked_s=now_s)

    def watching(self, said: Mapping[str, tuple[Move, tuple[str, int, int]]], now_s: float) -> Memory:
        """Remember the moves in flight, each with what its target says; those that are gone are forgotten."""
        return msgspec.structs.replace(
            self, moves={ident: self._watched(move, words, now_s) for ident, (move, words) in said.items()}
        )

    def _watched(self, move: Move, said: tuple[str, int, int], now_s: float) -> Watched:
        known = self.moves.get(move.id)
        if known is None or known.state != move.state:
            return Watched(move.state, now_s, said, now_s)
        return known if known.said == said else msgspec.structs.replace(known, said=said, said_since_s=now_s)

    def failed(self, pair: Pair, why: str, now_s: float) -> Memory:
        """A move of this pair was aborted although it is wanted."""
        before = self.failures.get(pair)
        count, since_s = (1, now_s) if before is None else (before.count + 1, before.since_s)
        pause_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(count - 1, 16))
        failure = Failure(count, since_s, now_s + pause_s, why)
        return msgspec.structs.replace(self, failures={**self.failures, pair: failure})

    def succeeded(self, pair: Pair) -> Memory:
        """A move of this pair was committed."""
        left = {other: failure for other, failure in self.failures.items() if other != pair}
        return msgspec.structs.replace(self, failures=left)

    def needing(self, pairs: Collection[Pair]) -> Memory:
        """Forget the failures of pairs that have nothing to move any more: what fails later is another matter."""
        left = {pair: failure for pair, failure in self.failures.items() if pair in pairs}
        return msgspec.structs.replace(self, failures=left)


NO_MEMORY: Final = Memory()
"""Of a controller that has just begun."""
