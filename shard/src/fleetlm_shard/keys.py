"""The idempotency window: which keys were used lately, for which message, with which content.

    (session, key) → seq, inserted_at, content hash, message id

A key enters when its record is queued (the record may not be durable yet: the sequencer compares `seq` with the
session's durable seq) and leaves when it is older than the window, or when the window is full and the key is old
enough that no retry of its request can be on its way (docs/adr/0003-key-window.md).

Promise: a key younger than `REQUEST_DEADLINE_S + KEY_WINDOW_MARGIN_S` is never evicted; when nothing may be evicted
and the hard bound is reached, `full` says so and the sequencer refuses. Age is monotonic time within a process. Of what
a boot reads only wall clocks tell the age, and they are set: so none of it goes before it is old enough by our own time
since then. Must not be done here: comparing contents, waiting for durability.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Final

import msgspec

from fleetlm_common.limits import KEY_WINDOW_MARGIN_S, REQUEST_DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from fleetlm_shard.records import Message

KEY_AGE_S_MIN: Final = REQUEST_DEADLINE_S + KEY_WINDOW_MARGIN_S
"""A retry may arrive until then; a younger key is never evicted."""
MARK_S: Final = 0.1
"""Ages and positions are kept per tenth of a second of keys, not per key: one object for up to `MARK_KEYS_MAX`."""
MARK_KEYS_MAX: Final = 10_000
"""Of one mark: what a boot reads may seem to be of one moment, however much it is."""
EVICTED_MARKS_MAX: Final = 4
"""Per call, so that an eviction never holds up the loop for more than a few milliseconds."""

_PACKED: Final = struct.Struct("<QQ16s36s")
_pack: Final = _PACKED.pack


class KnownKey(msgspec.Struct, frozen=True, gc=False):
    """The message that a key stands for."""

    seq: int
    inserted_at_us: int
    content_hash: bytes
    id: str


@dataclass(slots=True)
class _Mark:
    """Keys that entered together: since when, from which position of the log, how many."""

    at_s: float
    pos: int
    count: int


class KeyWindow:
    """The keys of one shard.

    Args:
        window_s: how long a key is kept.
        soft_max: keys kept when they are old enough to be evicted earlier.
        hard_max: keys kept at all; past it `full` is true.
    """

    def __init__(self, *, window_s: float, soft_max: int, hard_max: int) -> None:
        assert window_s >= KEY_AGE_S_MIN
        assert 1 <= soft_max <= hard_max
        self.window_s = window_s
        self._soft_max = soft_max
        self._hard_max = hard_max
        # Values are packed: 100 bytes instead of 250, and nothing for the garbage collector to walk.
        self._known: dict[tuple[str, str], bytes] = {}
        self._order: deque[tuple[str, str]] = deque()
        self._marks: deque[_Mark] = deque()
        # Names whose older use still stands in `_order` (only a rebuild makes them): how many to skip there.
        self._shadowed: dict[tuple[str, str], int] = {}
        self._old_enough_s = -inf
        """Until then nothing can be: what was read at boot may have been new."""

    def __len__(self) -> int:
        return len(self._known)

    @property
    def full(self) -> bool:
        """The hard bound is reached: an append with a new key must be refused as `overloaded`."""
        return len(self._known) >= self._hard_max

    def room(self) -> int:
        """How many more keys may enter."""
        return self._hard_max - len(self._known)

    def knows(self, session: str, key: str) -> bool:
        """Whether the key stands for a message."""
        return (session, key) in self._known

    def get(self, session: str, key: str) -> KnownKey | None:
        """What the key stands for, if it is known."""
        packed = self._known.get((session, key))
        if packed is None:
            return None
        seq, inserted_at_us, content_hash, ident = _PACKED.unpack(packed)
        return KnownKey(seq, inserted_at_us, content_hash, str(ident, "ascii"))

    def add(self, message: Message, ident: str, pos: int, at_s: float) -> None:
        """A message whose id is `ident` was queued at monotonic time `at_s`; the log gave it position `pos`."""
        packed = _pack(message.seq, message.inserted_at_us, message.content_hash, ident.encode())
        if self._enter((message.session, message.key), packed, pos, at_s):
            self.evict(at_s)

    def _enter(self, name: tuple[str, str], packed: bytes, pos: int, at_s: float) -> bool:
        """Whether it began a mark: time to evict."""
        assert name not in self._known
        self._known[name] = packed
        self._order.append(name)
        marks = self._marks
        if marks and at_s - marks[-1].at_s < MARK_S and marks[-1].count < MARK_KEYS_MAX:
            marks[-1].count += 1
            return False
        marks.append(_Mark(at_s, pos, 1))
        return True

    def restore(self, session: str, key: str, known: KnownKey, *, pos: int, at_s: float) -> None:
        """Boot read this message from the log, whose own time was `at_s` then; `restored` ends it.

        A key that occurs again (its first use had left the window) replaces the older one. Steps of clocks make keys
        look old: they go only when there are too many, and by the soft bound only those older than the window.
        """
        if self._replace(session, key, known, pos, at_s):
            self._drop(at_s, lambda age_s: len(self) > (self._soft_max if age_s > self.window_s else self._hard_max))

    def _replace(self, session: str, key: str, known: KnownKey, pos: int, at_s: float) -> bool:
        name = (session, key)
        if self._known.pop(name, None) is not None:
            self._shadowed[name] = self._shadowed.get(name, 0) + 1
        packed = _pack(known.seq, known.inserted_at_us, known.content_hash, known.id.encode())
        return self._enter(name, packed, pos, at_s)

    def take(self, session: str, key: str, known: KnownKey, *, pos: int, at_s: float) -> None:
        """A message came from another shard, in whose window its key was: it stays as long as one that is new here."""
        if self.get(session, key) != known and self._replace(session, key, known, pos, at_s):
            self.evict(at_s)

    def restored(self, *, log_s: float, now_s: float) -> None:
        """All of the log was read: its time `log_s` is the monotonic time `now_s`."""
        for mark in self._marks:
            mark.at_s += now_s - log_s
        self._old_enough_s = now_s + KEY_AGE_S_MIN

    def evict(self, now_s: float) -> int:
        """Drop what is too old, and what is too many and old enough; returns how many went."""
        if now_s <= self._old_enough_s:
            return 0
        return self._drop(
            now_s, lambda age_s: age_s > self.window_s or (age_s > KEY_AGE_S_MIN and len(self) > self._soft_max)
        )

    def _drop(self, now_s: float, goes: Callable[[float], bool]) -> int:
        """Drop the oldest marks as long as one `goes` at its age."""
        dropped = 0
        marks, known, order = self._marks, self._known, self._order
        for _ in range(EVICTED_MARKS_MAX):
            # A mark's keys are up to MARK_S younger than it says.
            if not marks or not goes(now_s - marks[0].at_s - MARK_S):
                break
            for _ in range(marks.popleft().count):
                name = order.popleft()
                if self._shadowed and self._unshadowed(name):
                    continue
                del known[name]
                dropped += 1
        return dropped

    def _unshadowed(self, name: tuple[str, str]) -> bool:
        """Whether this place in the order belongs to an older use of the name; forgets it."""
        count = self._shadowed.get(name, 0)
        if count == 0:
            return False
        if count == 1:
            del self._shadowed[name]
        else:
            self._shadowed[name] = count - 1
        return True

    def from_pos(self, durable_pos: int) -> int:
        """Where the window begins in the log: a boot must read from there to know all of it."""
        return min(self._marks[0].pos, durable_pos) if self._marks else durable_pos
