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
from typing import TYPE_CHECKING, Final

from crc32c import crc32c

from fleetlm_common.ids import SessionId
from fleetlm_shard import framing
from fleetlm_shard.chain import add_frames, read_span
from fleetlm_shard.framing import BATCH_FRAME_BYTES, FRAME_BYTES, FRAME_START, HEADER_BYTES, UNCHECKED_BYTES, Batch
from fleetlm_shard.housekeeping import write_index
from fleetlm_shard.log_types import BATCH_BYTES_MAX
from fleetlm_shard.records import OF_A_SLOT, VOID_TAIL
from fleetlm_shard.segment_index import MemoryIndex, decode_runs
from fleetlm_shard.segments import LOG_FOLDER, discard
from fleetlm_shard.table import KIND_INDEX, Table, TableDamaged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from fleetlm_shard.chain import Link
    from fleetlm_shard.checkpoints import KeptCheckpoints
    from fleetlm_shard.disk import Disk
    from fleetlm_shard.framing import Frame
    from fleetlm_shard.segments import SegmentId, TempNames

WORTH: Final = 8
"""A segment is written anew if that gives back at least this part of it (an eighth): else copying costs more than it
brings, and what is dead stays until more of the segment is."""
PAGE_BYTES: Final = 4096
"""What file systems keep or leave out as a whole."""
_PAUSE_BATCHES: Final = 16
"""Batches between two chances to pause."""
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


class Candidates:
    """Which segment to look at next; remembers up to which RELEASED each was looked at."""

    def __init__(self) -> None:
        self._looked: dict[SegmentId, int] = {}

    def next(self, links: Sequence[Link], released: Mapping[int, int], *, limit_pos: int) -> Link | None:
        """The oldest sealed segment below `limit_pos` that may hold something released since it was looked at.

        Args:
            links: sealed, ascending.
            released: slot → position below which nothing of it counts.
            limit_pos: no boot reads anything below.
        """
        newest_pos = max(released.values(), default=0)
        for link in links:
            if link.end_pos > limit_pos:
                return None
            since_pos = max(link.header.base_pos, self._looked.get(link.id, 0))
            if link.index_path is not None and newest_pos > since_pos:
                self._looked = {each.id: pos for each in links if (pos := self._looked.get(each.id))}
                self._looked[link.id] = newest_pos
                return link
        return None

    def again(self, link: Link) -> None:
        """It could not be written anew: look at it once more."""
        self._looked.pop(link.id, None)


def waits(links: Sequence[Link], released: Mapping[int, int], kept: KeptCheckpoints, *, keys_from_pos: int) -> bool:
    """Whether newer checkpoints would let more segments be looked at.

    Args:
        links: sealed, ascending.
        released: slot → position of its newest RELEASED.
        kept: the checkpoints.
        keys_from_pos: no new checkpoint would let anything beyond be looked at.
    """
    newest_pos, known_pos = max(released.values(), default=0), max(kept.released().values(), default=0)
    limit_pos = kept.limit_pos()
    return any(
        link.header.base_pos < newest_pos and link.end_pos <= keys_from_pos
        for link in links
        if link.end_pos > limit_pos or known_pos < newest_pos
    )


def compact_segment(
    disk: Disk,
    temps: TempNames,
    link: Link,
    *,
    released: Mapping[int, int],
    slot_of: Callable[[SessionId], int],
    reserve_bytes: int,
    pause: Callable[[], None],
) -> Compacted | None:
    """Write a sealed segment anew if enough of it is dead; None: it stays as it is.

    Runs in a background thread, in slices with pauses. Durable when it returns; may be cut off anywhere. Of the
    reserve it takes half at most: what a full disk has left must do for checkpoints, too.

    Raises:
        OSError: the disk refuses; nothing has changed.
    """
    assert link.index_path is not None
    if not _has_dead_messages(disk, link, released, slot_of, pause):
        return None
    read = _read(disk, link, pause)
    if read is None:
        return None
    data, batches = read
    rewriting = _Rewriting(data, link, released)
    for number, batch in enumerate(batches):
        rewriting.take(batch)
        if number % _PAUSE_BATCHES == 0:
            pause()
    pieces = rewriting.pieces()
    needed_bytes = _pages(pieces) * PAGE_BYTES
    if (_stored(disk, link.path) - needed_bytes) * WORTH >= link.header.size:
        if disk.free_bytes() - needed_bytes < reserve_bytes // 2:
            raise OSError(errno.ENOSPC, f"no {needed_bytes} bytes to write a segment anew", link.path)
        _write(disk, temps, link, pieces, pause)
    elif rewriting.died:
        return None
    # Last, so that an index that names what is dead says that the segment may have to be written anew.
    index = rewriting.index
    write_index(disk, temps, link, index, path=link.index_path, pause=pause)
    return Compacted(_stored(disk, link.path), index.messages, index.inserted_at_us_max)


def _read(disk: Disk, link: Link, pause: Callable[[], None]) -> tuple[bytes, list[Batch]] | None:
    """The segment's bytes and batches; None if it is damaged: whoever looks into that wants the file as it was."""
    base_pos, batches = link.header.base_pos, list[Batch]()
    span = read_span(disk, link, base_pos, link.end_pos)
    for piece in framing.scan(span.data, start_pos=base_pos, seed=link.header.seed, proven_pos=link.end_pos):
        if not isinstance(piece, Batch):
            return None
        batches.append(piece)
        if len(batches) % _PAUSE_BATCHES == 0:
            pause()
    whole = span.whole and bool(batches) and batches[-1].end_pos == link.end_pos
    return (span.data, batches) if whole else None


def _has_dead_messages(
    disk: Disk,
    link: Link,
    released: Mapping[int, int],
    slot_of: Callable[[SessionId], int],
    pause: Callable[[], None],
) -> bool:
    """Whether enough of the segment's messages do not count, by its index: that is some hundredth of its bytes."""
    assert link.index_path is not None
    dead = total = 0
    file = disk.open(link.index_path)
    try:
        for key, value in Table(file, KIND_INDEX).items():
            released_pos = released.get(slot_of(SessionId(key.decode())), 0)
            places = [pos for run in decode_runs(value, link.header.base_pos) for pos in run[1:]]
            total += len(places)
            dead += sum(pos < released_pos for pos in places)
            pause()
    except TableDamaged:
        return False
    finally:
        file.close()
    # Messages are not equally long, so the count may be far from the bytes: look closer early.
    return dead * WORTH * 4 >= total > 0 and dead > 0


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
        self.died = 0
        """Frames that count no more and are still there."""

    def take(self, batch: Batch) -> None:
        """The next batch."""
        live = [frame for frame in batch.frames if not self._is_dead(frame)]
        if live:
            self._end_dead()
            self._take_live(batch, live)
            add_frames(self.index, self._data, live)
            return
        if self._dead and batch.end_pos - self._dead[0].pos > BATCH_BYTES_MAX:
            # Nobody who reads a batch at a time needs more room than before.
            self._end_dead()
        self._dead.append(batch)

    def _is_dead(self, frame: Frame) -> bool:
        pos, kind, slot, _, _ = frame
        if kind == VOID_TAIL[0]:
            return True
        dead = kind in OF_A_SLOT and pos < self._released.get(slot, 0)
        self.died += dead
        return dead

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
        self._batch(first.pos, last.end_pos, last.synced_pos, 1)
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


def _stored(disk: Disk, path: str) -> int:
    file = disk.open(path)
    try:
        return file.stored_bytes()
    finally:
        file.close()


def _write(
    disk: Disk,
    temps: TempNames,
    link: Link,
    pieces: list[tuple[int, bytes | memoryview]],
    pause: Callable[[], None],
) -> None:
    """Write the file, sync it, give it the segment's name."""
    temp = temps.next()
    file = disk.create(temp)
    try:
        for offset, data in pieces:
            file.pwrite(data, offset)
            pause()
        if pieces[-1][0] + len(pieces[-1][1]) < link.header.size:
            file.pwrite(b"\0", link.header.size - 1)
        file.sync()
    except OSError:
        discard(disk, file, temp)
        raise
    file.close()
    disk.replace(temp, link.path)
    disk.sync_folder(LOG_FOLDER)


assert len(VOID_TAIL) + UNCHECKED_BYTES == FRAME_BYTES
