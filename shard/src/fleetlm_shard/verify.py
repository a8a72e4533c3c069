"""Offline check of a shard's volume, for `fleetlm verify DIR`: reads everything, writes nothing.

Checked: identity, headers (both copies), lengths, the chain, every frame's checksum, contiguity of each session's seqs,
every block of every table, indexes against their segments, the newest checkpoint against the log.
Promise: a volume without problems boots, and serves exactly what was acknowledged. With a living owner only what is
sealed is checked, and the report says so. Must not be done here: repairs.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from fleetlm_shard import framing, records
from fleetlm_shard.chain import Chain, Link, add_frames, read_chain, read_span
from fleetlm_shard.checkpoints import Checkpoint, load_checkpoint
from fleetlm_shard.compaction import is_dead
from fleetlm_shard.disk import OsDisk
from fleetlm_shard.framing import HEADER_BYTES, Hole, UnknownFormat
from fleetlm_shard.identity import read_identity
from fleetlm_shard.log_types import LogUnreadable
from fleetlm_shard.records import (
    Damaged,
    Imported,
    Message,
    RecordType,
    SessionImported,
    SlotsReleased,
    Trimmed,
)
from fleetlm_shard.segment_index import IndexMeta, MemoryIndex, decode_runs
from fleetlm_shard.segments import LOG_FOLDER, Listing, checkpoint_path, index_path, parse_names, segment_path
from fleetlm_shard.table import KIND_INDEX, Table, TableDamaged
from fleetlm_shard.terms import find_highest_term
from fleetlm_shard.volume_types import VolumeUnreadable, term_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from fleetlm_shard.disk import Disk
    from fleetlm_shard.framing import Frame

PROBLEMS_MAX = 1000
"""Problems told one by one; a destroyed disk would tell millions."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something is not as it was written. `path` is relative to the volume."""

    path: str
    what: str


@dataclass(slots=True)
class VerifyReport:
    """What was looked at and what is wrong.

    Attributes:
        owner_alive: a process holds the volume; its newest segment was left out.
        strays: files that are not part of the log (no problem: a frozen elder leaves them).
        torn_bytes: of the newest segment beyond the log's end, not zero: a batch that was never acknowledged.
    """

    folder: str
    ring_uid: str = ""
    shard: str = ""
    owner_alive: bool = False
    segments: int = 0
    checkpoints: int = 0
    indexes: int = 0
    sessions: int = 0
    messages: int = 0
    checked_bytes: int = 0
    from_pos: int = 0
    end_pos: int = 0
    torn_bytes: int = 0
    strays: list[str] = field(default_factory=list[str])
    problems: list[Problem] = field(default_factory=list[Problem])

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems


class LogReader:
    """Identity in the form that `read_chain` asks for; it is never asked to look."""

    def __init__(self, ring_uid: str, shard: str) -> None:
        self.term = 0
        self.ring_uid = ring_uid
        self.shard = shard

    def look(self) -> None:
        """Nothing is promised to anybody here."""


def verify(folder: Path, *, progress: Callable[[int, int], None] = lambda _done, _all: None) -> VerifyReport:
    """Check a volume.

    Args:
        folder: the shard's data folder.
        progress: called with the segments done and their number.
    """
    return verify_disk(OsDisk(folder), str(folder), progress=progress)


def verify_disk(disk: Disk, folder: str, *, progress: Callable[[int, int], None]) -> VerifyReport:
    """Check a volume behind any `Disk`."""
    check = _Verification(disk, VerifyReport(folder), progress)
    check.run()
    return check.report


@dataclass(slots=True)
class _Content:
    """What a segment holds: its index, the ranges of what does not count any more, whether it is damaged."""

    index: MemoryIndex = field(default_factory=MemoryIndex)
    gone: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    holes: bool = False


class _Verification:
    def __init__(self, disk: Disk, report: VerifyReport, progress: Callable[[int, int], None]) -> None:
        self._disk = disk
        self._progress = progress
        self._listing = Listing([], [], [], [], [])
        self._last: dict[str, tuple[int, int]] = {}
        self._slots: dict[str, int] = {}
        self._at_checkpoint: dict[str, int] = {}
        self._known: list[Damaged] = []
        self._trim_pos = 0
        self._checkpoint: Checkpoint | None = None
        self._released: Mapping[int, int] = {}
        self._voids: list[int] = []
        self.report = report

    def _problem(self, path: str, what: str) -> None:
        if len(self.report.problems) < PROBLEMS_MAX:
            self.report.problems.append(Problem(path, what))

    def run(self) -> None:
        """All checks, in the order of a boot."""
        report = self.report
        try:
            identity = read_identity(self._disk)
        except VolumeUnreadable as error:
            self._problem("identity", str(error))
            return
        if identity is None:
            self._problem("identity", "there is none: this folder is not a shard's volume, or it is empty")
            return
        report.ring_uid, report.shard = identity.ring_uid, identity.shard
        report.owner_alive = self._owner_alive()
        self._listing = parse_names(self._disk.listdir(LOG_FOLDER))
        report.strays += self._listing.unknown
        try:
            chain = read_chain(self._disk, LogReader(identity.ring_uid, identity.shard), self._listing)
        except LogUnreadable as error:
            self._problem(LOG_FOLDER, str(error))
            return
        self._checkpoints()
        self._chain(chain)
        report.sessions = len(self._last)
        self._against_checkpoint()

    def _owner_alive(self) -> bool:
        term = find_highest_term(self._disk)
        if not term:
            return False
        try:
            file = self._disk.open(term_path(term))
        except FileNotFoundError:
            return False
        try:
            # Given back at once by `close`; a boot at this very moment would only wait a little.
            return not file.try_lock()
        finally:
            file.close()

    # Checkpoints ---------------------------------------------------------------------------------------------------

    def _checkpoints(self) -> None:
        for own_id in self._listing.checkpoints:
            path = checkpoint_path(own_id)
            try:
                found = load_checkpoint(self._disk, own_id)
                for _ in found.rows(""):
                    pass
            except (TableDamaged, msgspec.MsgspecError) as error:
                self._problem(path, str(error))
                continue
            except FileNotFoundError:
                continue
            self.report.checkpoints += 1
            self.report.checked_bytes += found.table.size_bytes
            if self._checkpoint is not None:
                self._checkpoint.table.close()
            self._checkpoint = found
        if self._checkpoint is not None:
            stored = self._checkpoint.stored
            self._known += [Damaged(*each) for each in stored.damage]
            self._trim_pos = stored.trim.below_pos if stored.trim else 0
            self._released = stored.released

    def _against_checkpoint(self) -> None:
        if self._checkpoint is None:
            return
        path = checkpoint_path(self._checkpoint.id)
        rows = dict(self._checkpoint.rows(""))
        for session, seq in self._at_checkpoint.items():
            row = rows.get(session)
            if row is None or row.last_seq < seq:
                self._problem(path, f"session {session!r}: the log has seq {seq} below the checkpoint's position")
        if self._checkpoint.stored.pos > self.report.end_pos and not self.report.owner_alive:
            self._problem(path, f"it covers position {self._checkpoint.stored.pos}, the log ends before")
        self._checkpoint.table.close()

    # Segments ------------------------------------------------------------------------------------------------------

    def _chain(self, chain: Chain) -> None:
        report = self.report
        in_chain = {link.id for link in chain.links}
        for each in self._listing.segments:
            if each in chain.broken:
                self._problem(segment_path(each), "both copies of its header are destroyed")
            elif each not in in_chain:
                report.strays.append(segment_path(each))
        links = chain.links[:-1] if report.owner_alive else chain.links
        # What retention took and an elder that woke up put back counts for nobody.
        links = [link for link in links if link.end_pos > self._trim_pos or link is chain.links[-1]]
        end_pos = links[0].header.base_pos if links else 0
        report.from_pos = end_pos
        for number, link in enumerate(links):
            self._progress(number, len(links))
            if link.header.base_pos > end_pos:
                self._gap(link.path, end_pos, link.header.base_pos)
            self._segment(link, sealed=link is not chain.links[-1])
            end_pos = link.end_pos
        self._progress(len(links), len(links))
        report.end_pos = end_pos
        if links and links[0].header.base_pos > self._trim_pos:
            self._problem(LOG_FOLDER, f"the log's beginning up to position {links[0].header.base_pos} is missing")

    def _gap(self, path: str, from_pos: int, to_pos: int) -> None:
        if not self._is_known(from_pos, to_pos):
            self._problem(path, f"positions {from_pos} to {to_pos} before it are missing")
        self._known.append(Damaged(from_pos, to_pos, 0))

    def _segment(self, link: Link, *, sealed: bool) -> None:
        report, header = self.report, link.header
        report.segments += 1
        self._header(link)
        end_pos = link.end_pos if sealed else header.end_pos_max
        span = read_span(self._disk, link, header.base_pos, end_pos)
        if not span.whole:
            self._problem(link.path, "the file is shorter than its header says, or the disk does not give its bytes")
        content, at_pos = _Content(), header.base_pos
        pieces = framing.scan(
            span.data,
            start_pos=header.base_pos,
            seed=header.seed,
            proven_pos=end_pos if sealed else header.filled_pos,
        )
        for piece in pieces:
            if isinstance(piece, Hole):
                content.holes = True
                self._hole(link, piece)
            self._voids += [frame[0] for frame in piece.frames if frame[1] == RecordType.VOID]
            for pos, kind, slot, start, stop in self._take_frames(content, link, span.data, piece.frames):
                self._record(link, pos, kind=kind, slot=slot, body=span.data[start:stop])
            at_pos = piece.end_pos
        report.checked_bytes += HEADER_BYTES + len(span.data)
        if not sealed:
            report.torn_bytes = len(span.data[at_pos - header.base_pos :].rstrip(b"\0"))
            link.end_pos = at_pos
        if not content.holes:
            self._indexes(link, content)

    def _take_frames(self, content: _Content, link: Link, data: bytes, frames: Sequence[Frame]) -> list[Frame]:
        """Those that count."""
        gone = [frame for frame in frames if is_dead(frame, self._released)]
        content.gone += [(frame[0], link.header.base_pos + frame[4]) for frame in gone]
        alive = [frame for frame in frames if not is_dead(frame, self._released)] if gone else list(frames)
        add_frames(content.index, data, alive)
        return alive

    def _header(self, link: Link) -> None:
        try:
            file = self._disk.open(link.path)
        except FileNotFoundError:
            self._problem(link.path, "the file is missing")
            return
        try:
            _, copies = framing.decode_header(file.pread(HEADER_BYTES, 0))
            if copies < 2:
                self._problem(link.path, f"{2 - copies} of 2 copies of its header are damaged")
            if file.size() != link.header.size:
                self._problem(link.path, f"{file.size()} bytes long, its header says {link.header.size}")
        except (OSError, UnknownFormat) as error:
            self._problem(link.path, str(error))
        finally:
            file.close()

    def _hole(self, link: Link, hole: Hole) -> None:
        if not self._is_known(hole.pos, hole.end_pos):
            self._problem(
                link.path,
                f"positions {hole.pos} to {hole.end_pos} are damaged; up to {hole.lost_max} records are lost",
            )
        self._known.append(Damaged(hole.pos, hole.end_pos, hole.lost_max))

    def _is_known(self, from_pos: int, to_pos: int) -> bool:
        return any(each.from_pos <= from_pos and to_pos <= each.to_pos for each in self._known)

    def _record(self, link: Link, pos: int, *, kind: int, slot: int, body: bytes) -> None:
        try:
            record = records.decode(kind, slot, body)
        except (records.UnknownRecord, msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._problem(link.path, f"record at position {pos}: {error}")
            return
        if isinstance(record, Message):
            self._message(link, pos, record)
        elif isinstance(record, SessionImported):
            self._state(link, pos, record)
        elif isinstance(record, SlotsReleased):
            self._release(frozenset(record.slots))
        elif isinstance(record, Damaged):
            self._known.append(record)
        elif isinstance(record, Trimmed):
            self._trim_pos = max(self._trim_pos, record.below_pos)

    def _message(self, link: Link, pos: int, message: Message) -> None:
        self.report.messages += 1
        last_seq, last_pos = self._last.get(message.session, (0, 0))
        first_of_trimmed = not last_seq and self.report.from_pos > 0
        # What is missing at the source of a move is missing here: only the order can be checked.
        holes = isinstance(message, Imported) and message.seq > last_seq
        if message.seq != last_seq + 1 and not first_of_trimmed and not holes:
            explained = any(each.from_pos >= last_pos and each.to_pos <= pos for each in self._known)
            # A release that the checkpoint read here does not know: a living owner's next one, or there is none left.
            explained = explained or bisect_right(self._voids, last_pos) < bisect_right(self._voids, pos)
            if message.seq <= last_seq or not explained:
                self._problem(link.path, f"session {message.session!r}: seq {message.seq} after {last_seq} at {pos}")
        self._take(message.session, message.seq, pos, message.slot)

    def _state(self, link: Link, pos: int, state: SessionImported) -> None:
        last_seq, _ = self._last.get(state.session, (0, 0))
        if state.last_seq < last_seq:
            words = f"session {state.session!r}: a move says that {state.last_seq} is its last seq, after {last_seq}"
            self._problem(link.path, f"{words} at {pos}")
        self._take(state.session, state.last_seq, pos, state.slot)

    def _take(self, session: str, seq: int, pos: int, slot: int) -> None:
        self._last[session] = (seq, pos)
        self._slots[session] = slot
        if self._checkpoint is not None and pos < self._checkpoint.stored.pos:
            self._at_checkpoint[session] = seq

    def _release(self, slots: frozenset[int]) -> None:
        """What stood before does not count any more."""
        for session in [session for session in self._last if self._slots[session] in slots]:
            del self._last[session], self._slots[session]
            self._at_checkpoint.pop(session, None)

    # Indexes -------------------------------------------------------------------------------------------------------

    def _indexes(self, link: Link, content: _Content) -> None:
        for own in self._listing.indexes:
            if own.segment != link.id:
                continue
            path = index_path(own)
            try:
                self._index(link, content, path)
            except (TableDamaged, msgspec.MsgspecError) as error:
                self._problem(path, str(error))
            except FileNotFoundError:
                continue

    def _index(self, link: Link, content: _Content, path: str) -> None:
        meta, entries, size_bytes = self._read_index(path)
        self.report.indexes += 1
        self.report.checked_bytes += size_bytes
        if meta.end_pos != link.end_pos:
            # Of an elder that went on after the cut: never used.
            self.report.strays.append(path)
            return
        session = _differs(content, entries, link.header.base_pos)
        if session is not None:
            # A living owner may have compacted it since the segment was read.
            session = _differs(self._read_again(link), self._read_index(path)[1], link.header.base_pos)
        if session is not None:
            self._problem(path, f"does not agree with its segment, first at session {session!r}")

    def _read_index(self, path: str) -> tuple[IndexMeta, list[tuple[bytes, bytes]], int]:
        file = self._disk.open(path)
        try:
            table = Table(file, KIND_INDEX)
            return msgspec.json.decode(table.meta, type=IndexMeta), list(table.items()), table.size_bytes
        finally:
            file.close()

    def _read_again(self, link: Link) -> _Content:
        content, base_pos = _Content(), link.header.base_pos
        data = read_span(self._disk, link, base_pos, link.end_pos).data
        for piece in framing.scan(data, start_pos=base_pos, seed=link.header.seed, proven_pos=link.end_pos):
            self._take_frames(content, link, data, piece.frames)
        return content


def _differs(content: _Content, entries: list[tuple[bytes, bytes]], base_pos: int) -> str | None:
    """The first session of which an index says something else than its segment."""
    counted = _without(entries, content.gone, base_pos)
    for ours, theirs in _longest(counted, content.index.entries(base_pos, lambda: None)):
        if ours != theirs:
            return (ours or theirs or (b"?", b""))[0].decode(errors="replace")
    return None


def _without(
    entries: list[tuple[bytes, bytes]], gone: list[tuple[int, int]], base_pos: int
) -> Iterator[tuple[bytes, bytes]]:
    """An index's entries without the messages at these ranges: a crash may leave it older than its segment."""
    if not gone:
        yield from entries
        return
    starts = [start_pos for start_pos, _ in gone]
    for key, value in entries:
        index = MemoryIndex()
        for run in decode_runs(value, base_pos):
            for seq, pos in enumerate(run[1:], run[0]):
                at = bisect_right(starts, pos) - 1
                if at < 0 or pos >= gone[at][1]:
                    index.add(key.decode(), seq, pos)
        yield from index.entries(base_pos, lambda: None)


def _longest(
    ours: Iterator[tuple[bytes, bytes]], theirs: Iterator[tuple[bytes, bytes]]
) -> Iterator[tuple[tuple[bytes, bytes] | None, tuple[bytes, bytes] | None]]:
    while True:
        pair = next(ours, None), next(theirs, None)
        if pair == (None, None):
            return
        yield pair
