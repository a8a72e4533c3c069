"""Which messages of which sessions lie where in one segment: in memory while it grows, as a table once it is sealed.

Promise: positions of a session ascend with its seqs; what was lost to damage before the index was made is not in it.
Must not be done here: reading messages (`reader.py`), files and names (`segments.py`).
"""

from __future__ import annotations

import heapq
import struct
from bisect import bisect_left
from typing import TYPE_CHECKING, Final

import msgspec

from fleetlm_shard.framing import SegmentHeader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_RUN: Final = struct.Struct("<QI")
_OFFSET_BYTES: Final = 4

_SORT_NAMES: Final = 512
"""Names sorted at once: one long sort would hold the interpreter, and with it the loop."""
_PAUSE_ENTRIES: Final = 32
"""Entries encoded between two chances to pause."""

Run = list[int]
"""First seq, then the position of it and of each seq after it."""


class IndexMeta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Metadata of an index: enough to read the segment even if its own header is destroyed."""

    header: SegmentHeader
    end_pos: int
    messages: int
    inserted_at_us_max: int


class Found(msgspec.Struct, gc=False):
    """Where a session's messages from some seq on lie in one segment.

    `lowest_seq`: the first that the segment holds of the session at all. `more`: there are later ones than `places`.
    """

    lowest_seq: int
    places: list[tuple[int, int]]
    more: bool


class MemoryIndex:
    """The index of a segment that is not sealed, or sealed and not written yet."""

    __slots__ = ("_older", "_runs", "inserted_at_us_max", "messages")

    def __init__(self) -> None:
        self._runs: dict[str, Run] = {}
        self._older: dict[str, list[Run]] = {}
        self.messages = 0
        self.inserted_at_us_max = 0

    def add(self, session: str, seq: int, pos: int) -> None:
        """Take in a message; of each session in the order of positions."""
        self.messages += 1
        run = self._runs.get(session)
        if run is None:
            self._runs[session] = [seq, pos]
        elif seq == run[0] + len(run) - 1:
            run.append(pos)
        else:
            self._older.setdefault(session, []).append(run)
            self._runs[session] = [seq, pos]

    def runs(self, session: str) -> list[Run]:
        """All runs of a session, ascending."""
        last = self._runs.get(session)
        return [] if last is None else [*self._older.get(session, ()), last]

    def find(self, session: str, first_seq: int, limit: int, from_pos: int = 0) -> Found | None:
        """Up to `limit` places from `first_seq` on, at `from_pos` or beyond; None if the segment has nothing there."""
        return _find(self.runs(session), first_seq, limit, from_pos)

    def split(self, pos: int) -> tuple[MemoryIndex, MemoryIndex]:
        """What lies below `pos`, and the rest."""
        below, beyond = MemoryIndex(), MemoryIndex()
        for session in self._runs:
            for run in self.runs(session):
                for seq, own_pos in enumerate(run[1:], run[0]):
                    (below if own_pos < pos else beyond).add(session, seq, own_pos)
        below.inserted_at_us_max = beyond.inserted_at_us_max = self.inserted_at_us_max
        return below, beyond

    def entries(self, base_pos: int, pause: Callable[[], None]) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values of the table, ascending; `pause` is called every few entries."""
        names = list(self._runs)
        sorted_runs: list[list[tuple[bytes, str]]] = []
        for start in range(0, len(names), _SORT_NAMES):
            sorted_runs.append(sorted((name.encode(), name) for name in names[start : start + _SORT_NAMES]))
            pause()
        for count, (key, session) in enumerate(heapq.merge(*sorted_runs)):
            yield key, encode_runs(self.runs(session), base_pos)
            if count % _PAUSE_ENTRIES == 0:
                pause()


def encode_runs(runs: list[Run], base_pos: int) -> bytes:
    """The value of one session; positions become offsets from the segment's base."""
    parts: list[bytes] = []
    for run in runs:
        offsets = [pos - base_pos for pos in run[1:]]
        parts += (_RUN.pack(run[0], len(offsets)), struct.pack(f"<{len(offsets)}I", *offsets))
    return b"".join(parts)


def decode_runs(value: bytes, base_pos: int) -> list[Run]:
    """The inverse of `encode_runs`."""
    runs: list[Run] = []
    at = 0
    while at < len(value):
        first_seq, count = _RUN.unpack_from(value, at)
        at += _RUN.size
        runs.append([first_seq, *(base_pos + each for each in struct.unpack_from(f"<{count}I", value, at))])
        at += count * _OFFSET_BYTES
    return runs


def _find(runs: list[Run], first_seq: int, limit: int, from_pos: int) -> Found | None:
    if from_pos:
        runs = [found for found in (_run_from(run, from_pos) for run in runs) if len(found) > 1]
    if not runs:
        return None
    places: list[tuple[int, int]] = []
    more = False
    for run in runs:
        skip = max(first_seq - run[0], 0)
        want = limit - len(places)
        part = run[1 + skip : 1 + skip + want]
        places += zip(range(run[0] + skip, run[0] + skip + len(part)), part, strict=True)
        more = more or len(run) - 1 - skip > want
    return Found(runs[0][0], places, more)


def _run_from(run: Run, from_pos: int) -> Run:
    """What of a run lies at `from_pos` or beyond (positions ascend within it)."""
    skip = bisect_left(run, from_pos, 1) - 1
    return run if skip == 0 else [run[0] + skip, *run[1 + skip :]]


def find_in_value(value: bytes, base_pos: int, *, first_seq: int, limit: int, from_pos: int = 0) -> Found | None:
    """As `MemoryIndex.find`, from a table's value; decodes no more than it returns (unless the slot was released)."""
    if from_pos > base_pos:
        return _find(decode_runs(value, base_pos), first_seq, limit, from_pos)
    places: list[tuple[int, int]] = []
    more = False
    lowest_seq = 0
    at = 0
    while at < len(value):
        run_seq, count = _RUN.unpack_from(value, at)
        at += _RUN.size
        lowest_seq = lowest_seq or run_seq
        skip = min(max(first_seq - run_seq, 0), count)
        take = min(count - skip, limit - len(places))
        offsets = struct.unpack_from(f"<{take}I", value, at + skip * _OFFSET_BYTES)
        places += zip(range(run_seq + skip, run_seq + skip + take), (base_pos + each for each in offsets), strict=True)
        more = more or count - skip > take
        at += count * _OFFSET_BYTES
    return Found(lowest_seq, places, more)
