"""Compaction: a sealed segment is written anew without what slots that were released left in it (docs/log.md).

    BATCH m1 i1 i2 i3 m2 | BATCH i4 i5 | BATCH m3      i: of a released slot
    BATCH m1 VOID     m2 | BATCH VOID  | BATCH m3      a VOID's body is zeros, and a hole of the file

Every position stays what it was, so indexes, checkpoints and readers need not know. The new file takes the old one's
name in one step (the only rename of a volume): whichever of the two a crash leaves there, whoever reads finds the same.

Promise: what still counts is there afterwards, byte for byte at its position; until the new file is synced, the old one
stays. Must not be done here: deciding what counts (the caller gives positions of RELEASED that both kept checkpoints
know), keeping the log's state (`log.py`).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from crc32c import crc32c

from fleetlm_common import limits
from fleetlm_common.ids import SessionId
from fleetlm_shard import framing
from fleetlm_shard.chain import add_frames, read_span, stored_bytes
from fleetlm_shard.framing import BATCH_FRAME_BYTES, FRAME_BYTES, FRAME_START, HEADER_BYTES, UNCHECKED_BYTES, Batch
from fleetlm_shard.housekeeping import write_index
from fleetlm_shard.log_types import BATCH_BYTES_MAX
from fleetlm_shard.records import OF_A_SLOT, VOID_TAIL, RecordType
from fleetlm_shard.segment_index import MemoryIndex, decode_runs
from fleetlm_shard.segments import discard, publish_over
from fleetlm_shard.table import KIND_INDEX, Table, TableDamaged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from fleetlm_shard.chain import Link
    from fleetlm_shard.disk import Disk
    from fleetlm_shard.framing import Frame
    from fleetlm_shard.segments import TempNames

WORTH: Final = 8
"""A segment is written anew if that gives back at least this part of it (an eighth): else copying costs more than it
brings, and what is dead stays until more of the segment is."""
PAGE_BYTES: Final = 4096
"""What file systems keep or leave out as a whole."""
MESSAGE_REACH_BYTES: Final = limits.FRAME_BYTES_MAX
"""No message is longer."""
_SORTED_BYTES: Final = 1024 * 1024
"""Places of so much of a segment are sorted at once: one long sort would hold the interpreter."""
_ZEROS: Final = bytes(64 * 1024)


@dataclass(frozen=True, slots=True)
class Compacted:
    """A segment was written anew.

    Attributes:
        stored_bytes: what its file takes now.
        messages: how many it still has.
        inserted_at_us_max: of the newest of them; 0 if there is none.
    """

    stored_bytes: int
    messages: int
    inserted_at_us_max: int

    def apply(self, link: Link) -> int:
        """Say it of the link; returns how many bytes the volume got back."""
        back_bytes = link.stored_bytes - self.stored_bytes
        link.stored_bytes, link.messages = self.stored_bytes, self.messages
        link.inserted_at_us_max = self.inserted_at_us_max
        return back_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """All that writing a segment anew needs.

    Attributes:
        disk, temps: of the volume.
        link: the segment; sealed.
        index_path: its index.
        released: slot → position below which nothing of it counts, by both kept checkpoints.
        slot_of: the slot of a session id.
        reserve_bytes: of it half is taken at most, but for what is small: a full disk must do for checkpoints, too.
        look: raises if a younger term exists: it would not expect that a file changes.
        pause: called between slices of work; may raise `CompactionEnded`.
    """

    disk: Disk
    temps: TempNames
    link: Link
    index_path: str
    released: Mapping[int, int]
    slot_of: Callable[[SessionId], int]
    reserve_bytes: int
    look: Callable[[], None]
    pause: Callable[[], None]


class CompactionEnded(Exception):
    """Something else needs the lane; nothing has changed."""


def compact_segment(task: Task) -> Compacted | None:
    """Write a sealed segment anew if that gives enough back; None: it stays as it is.

    Runs in a background thread. Durable when it returns; may be cut off anywhere.

    Raises:
        CompactionEnded: by `pause`.
        OSError: the disk refuses. What is there says the same as before.
        Exception: whatever the fence raises.
    """
    link, before_bytes = task.link, stored_bytes(task.disk, task.link)
    pages = _pages_alive(task)
    if pages is None or (before_bytes - pages * PAGE_BYTES) * WORTH < link.header.size:
        return None
    rewriting = _rewritten(task)
    if rewriting is None:
        return None
    pieces = rewriting.pieces()
    needed_bytes = _pages(pieces) * PAGE_BYTES
    if (before_bytes - needed_bytes) * WORTH < link.header.size:
        return None
    _check_room(task, needed_bytes)
    _write(task, pieces)
    # An index that still names what is gone does no harm, should it stay: nobody asks for it.
    index = rewriting.index
    task.look()
    write_index(task.disk, task.temps, link, index, path=task.index_path, publish=publish_over, pause=task.pause)
    return Compacted(stored_bytes(task.disk, link), index.messages, index.inserted_at_us_max)


def _check_room(task: Task, needed_bytes: int) -> None:
    free_bytes = task.disk.free_bytes()
    if free_bytes - needed_bytes < task.reserve_bytes // 2 and needed_bytes > free_bytes // 8:
        words = f"{needed_bytes} bytes to write a segment anew are too many of {free_bytes} that are free"
        raise OSError(errno.ENOSPC, words, task.link.path)


def _pages_alive(task: Task) -> int | None:
    """How many pages at least hold messages that count, by the index alone; None: it is damaged, or has gone.

    A message reaches to the next one, or as far as a message can: what stands between them that is none is taken for
    alive. That is some hundredth of the reading that the segment itself would be.
    """
    base_pos, places = task.link.header.base_pos, dict[int, list[int]]()
    try:
        file = task.disk.open(task.index_path)
    except FileNotFoundError:
        return None
    try:
        for key, value in Table(file, KIND_INDEX).items():
            released_pos = task.released.get(task.slot_of(SessionId(key.decode())), 0)
            for run in decode_runs(value, base_pos):
                for pos in run[1:]:
                    # The last bit says whether it counts.
                    places.setdefault((pos - base_pos) // _SORTED_BYTES, []).append(2 * pos + (pos >= released_pos))
            task.pause()
    except TableDamaged:
        return None
    finally:
        file.close()
    count, last = 1, 0
    for bucket in sorted(places):
        found = sorted(places[bucket])
        # Of the last one, that it begins.
        for place, following in pairwise([*found, found[-1] + 2]):
            if place & 1:
                start, stop = HEADER_BYTES + place // 2 - base_pos, HEADER_BYTES + following // 2 - base_pos
                first = max(start // PAGE_BYTES, last + 1)
                last = max(last, (min(stop, start + MESSAGE_REACH_BYTES) - 1) // PAGE_BYTES)
                count += last + 1 - first
        task.pause()
    return count


def _rewritten(task: Task) -> _Rewriting | None:
    """All batches of the segment, taken; None if it is damaged: whoever looks into that wants the file as it was."""
    link = task.link
    span = read_span(task.disk, link, link.header.base_pos, link.end_pos)
    rewriting, end_pos = _Rewriting(span.data, link, task.released), link.header.base_pos
    for batch in framing.batches(span.data, start_pos=link.header.base_pos, seed=link.header.seed):
        rewriting.take(batch)
        end_pos = batch.end_pos
        task.pause()
    return rewriting if span.whole and end_pos == link.end_pos else None


def is_dead(frame: Frame, released: Mapping[int, int]) -> bool:
    """Whether a frame does not count any more, or is what a compaction put in the place of such."""
    pos, kind, slot, _, _ = frame
    return kind == RecordType.VOID or (kind in OF_A_SLOT and pos < released.get(slot, 0))


class _Rewriting:
    """The pieces of the new file, batch by batch: (offset in the file, bytes), ascending."""

    def __init__(self, data: bytes, link: Link, released: Mapping[int, int]) -> None:
        self._data = memoryview(data)
        self._base_pos = link.header.base_pos
        self._seed = link.header.seed
        self._released = released
        self._dead: list[Batch] = []
        self._copied = (0, 0)
        self._pieces: list[tuple[int, bytes | memoryview]] = [(0, framing.encode_header(link.header))]
        self.index = MemoryIndex()

    def take(self, batch: Batch) -> None:
        """The next batch."""
        live = [frame for frame in batch.frames if not is_dead(frame, self._released)]
        if live:
            self._end_dead()
            self._take_live(batch, live)
            add_frames(self.index, self._data, live)
            return
        if self._dead and batch.end_pos - self._dead[0].pos > BATCH_BYTES_MAX:
            # Nobody who reads a batch at a time needs more room than before.
            self._end_dead()
        self._dead.append(batch)

    def _take_live(self, batch: Batch, live: list[Frame]) -> None:
        """The batch with its live frames where they are, and a VOID for each run of the others."""
        if len(live) == len(batch.frames):
            self._copy(batch.pos, batch.end_pos)
            return
        runs: list[tuple[int, int]] = []
        for pos, _, _, _, stop in live:
            if runs and runs[-1][1] == pos:
                runs[-1] = (runs[-1][0], self._base_pos + stop)
            else:
                runs.append((pos, self._base_pos + stop))
        ends = [batch.pos + BATCH_FRAME_BYTES, *(stop_pos for _, stop_pos in runs)]
        begins = [*(pos for pos, _ in runs), batch.end_pos]
        voids = [(pos, stop_pos) for pos, stop_pos in zip(ends, begins, strict=True) if pos < stop_pos]
        self._batch(batch.pos, batch.end_pos, batch.synced_pos, len(live) + len(voids))
        for pos, stop_pos, alive in sorted([(*run, True) for run in runs] + [(*void, False) for void in voids]):
            if alive:
                self._copy(pos, stop_pos)
            else:
                self._void(pos, stop_pos)

    def _end_dead(self) -> None:
        """One batch with one VOID in place of those in which nothing is alive."""
        if not self._dead:
            return
        first, last = self._dead[0], self._dead[-1]
        self._dead = []
        if last.end_pos - first.pos == BATCH_FRAME_BYTES:
            # A mark alone: too short for anything else.
            self._copy(first.pos, last.end_pos)
            return
        # Not the last one's: a batch never proves what lies beyond its own beginning.
        self._batch(first.pos, last.end_pos, first.synced_pos, 1)
        self._void(first.pos + BATCH_FRAME_BYTES, last.end_pos)

    def _batch(self, pos: int, end_pos: int, synced_pos: int, frames: int) -> None:
        frames_bytes = end_pos - pos - BATCH_FRAME_BYTES
        head = framing.batch_frame(
            pos=pos, synced_pos=synced_pos, frames=frames, frames_bytes=frames_bytes, seed=self._seed
        )
        self._put(pos, head)

    def _void(self, pos: int, stop_pos: int) -> None:
        """A VOID from `pos` to `stop_pos`; all but its beginning is zeros."""
        body_bytes = stop_pos - pos - FRAME_BYTES
        crc, rest = crc32c(VOID_TAIL, self._seed), body_bytes
        while rest:
            part = min(rest, len(_ZEROS))
            crc, rest = crc32c(_ZEROS if part == len(_ZEROS) else _ZEROS[:part], crc), rest - part
        self._put(pos, FRAME_START.pack(body_bytes, crc) + VOID_TAIL)

    def _copy(self, pos: int, stop_pos: int) -> None:
        """As it is."""
        start, stop = self._copied
        at = pos - self._base_pos
        if start < stop == at:
            self._pieces.pop()
            at = start
        self._copied = at, stop_pos - self._base_pos
        self._pieces.append((HEADER_BYTES + at, self._data[at : stop_pos - self._base_pos]))

    def _put(self, pos: int, data: bytes) -> None:
        self._copied = 0, 0
        self._pieces.append((HEADER_BYTES + pos - self._base_pos, data))

    def pieces(self) -> list[tuple[int, bytes | memoryview]]:
        """Between them lie zeros. Ends the rewriting."""
        self._end_dead()
        return self._pieces


def _pages(pieces: Iterable[tuple[int, bytes | memoryview]]) -> int:
    """Pages that these pieces touch."""
    count, last = 0, -1
    for offset, data in pieces:
        first = max(offset // PAGE_BYTES, last + 1)
        last = max(last, (offset + len(data) - 1) // PAGE_BYTES)
        count += last + 1 - first
    return count


def _write(task: Task, pieces: list[tuple[int, bytes | memoryview]]) -> None:
    """Write the file, sync it, give it the segment's name."""
    disk, link, temp = task.disk, task.link, task.temps.next()
    file = disk.create(temp)
    try:
        for offset, data in pieces:
            file.pwrite(data, offset)
            task.pause()
        if pieces[-1][0] + len(pieces[-1][1]) < link.header.size:
            file.pwrite(b"\0", link.header.size - 1)
        file.sync()
        task.look()
        publish_over(disk, temp, link.path)
    except Exception:
        discard(disk, file, temp)
        raise
    file.close()


assert len(VOID_TAIL) + UNCHECKED_BYTES == FRAME_BYTES
